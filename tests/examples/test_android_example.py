"""What can be run of the Android example without Android: its native methods, from Java."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JAVA = """
package kbs;
public class KbsDelegate {
  static { System.loadLibrary("kbs_jni"); }
  private static native long create(int numThreads);
  private static native void destroy(long handle);
  public static void main(String[] arguments) {
    long handle = create(2);
    System.out.println(handle != 0);
    destroy(handle);
    try {
      create(0);
    } catch (IllegalArgumentException error) {
      System.out.println(error.getMessage());
    }
  }
}
"""


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_native_methods_from_java(tmp_path):
    javac = shutil.which("javac")
    if not javac:
        pytest.skip("needs a JDK")
    headers = Path(javac).resolve().parents[1] / "include"
    run("cmake", "-S", ROOT / "examples" / "android", "-B", tmp_path, f"-DKBS_JNI_INCLUDES={headers};{headers}/linux")
    run("cmake", "--build", tmp_path, "-j2")
    (tmp_path / "KbsDelegate.java").write_text(JAVA)
    run(javac, "-d", tmp_path, tmp_path / "KbsDelegate.java")
    lines = run("java", f"-Djava.library.path={tmp_path}", "-cp", tmp_path, "kbs.KbsDelegate").splitlines()
    assert lines[0] == "true"
    assert "num_threads must be a whole number from 1 to 1024" in lines[1]
