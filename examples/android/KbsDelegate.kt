package kbs

import org.tensorflow.lite.Delegate

/** The delegate for `Interpreter.Options().addDelegate(...)`. Close it after the interpreters that it was given to. */
class KbsDelegate(numThreads: Int = 1) : Delegate {
    private var handle = create(numThreads)

    override fun getNativeHandle(): Long = handle

    override fun close() {
        if (handle != 0L) destroy(handle)
        handle = 0L
    }

    companion object {
        init {
            System.loadLibrary("kbs_jni")
        }

        /** @throws IllegalArgumentException if [numThreads] is not from 1 to 1024. */
        @JvmStatic
        private external fun create(numThreads: Int): Long

        @JvmStatic
        private external fun destroy(handle: Long)
    }
}
