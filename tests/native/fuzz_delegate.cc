// Graphs made of bytes, for the delegate: a libFuzzer target, and with -DKBS_MAIN a program that runs files of such bytes.
//
// The bytes choose an operator that is right, and then what is wrong with it, so that most inputs get far and any part of
// a file may lie. What must hold: no step beyond any memory, no leak, no broken rule of the runtime.
#include "fake_tflite.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fake::drive(data, size);
  return 0;
}

#if defined(KBS_MAIN)
#include "replay.h"
#endif
