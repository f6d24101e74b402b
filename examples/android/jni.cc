// The delegate for Java and Kotlin: two native methods of kbs.KbsDelegate.
#include <jni.h>

#include <cstddef>
#include <string>

struct TfLiteDelegate;
extern "C" TfLiteDelegate* tflite_plugin_create_delegate(char**, char**, size_t, void (*report_error)(const char*));
extern "C" void tflite_plugin_destroy_delegate(TfLiteDelegate*);

namespace {
thread_local std::string error;
}

extern "C" JNIEXPORT jlong JNICALL Java_kbs_KbsDelegate_create(JNIEnv* env, jclass, jint num_threads) {
  std::string key = "num_threads", value = std::to_string(num_threads);
  char *keys[] = {key.data()}, *values[] = {value.data()};
  error = "keras_blocksparse: no delegate";
  TfLiteDelegate* delegate = tflite_plugin_create_delegate(keys, values, 1, [](const char* text) { error = text; });
  if (!delegate) env->ThrowNew(env->FindClass("java/lang/IllegalArgumentException"), error.c_str());
  return reinterpret_cast<jlong>(delegate);
}

extern "C" JNIEXPORT void JNICALL Java_kbs_KbsDelegate_destroy(JNIEnv*, jclass, jlong handle) {
  tflite_plugin_destroy_delegate(reinterpret_cast<TfLiteDelegate*>(handle));
}
