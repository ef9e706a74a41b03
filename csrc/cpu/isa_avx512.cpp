// The CPU kernels in AVX512. Every system header comes before the pragma: no inline function of theirs may be
// compiled for a processor that the program may not run on.
#include "kernels.h"

#if FASTMETA_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#endif

#define FASTMETA_ISA avx512
#define FASTMETA_TABLE kAvx512
#define FASTMETA_VECTOR_BYTES 64
#include "isa_tables.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
