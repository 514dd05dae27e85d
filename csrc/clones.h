// TARGET_CLONES before a function: compiled for AVX-512, AVX2 and the base machine, picked when the program starts.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TARGET_CLONES
#endif
#define INLINE inline __attribute__((always_inline))
