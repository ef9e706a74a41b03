// The CPU kernels in AVX2. Every system header comes before the pragma: no inline function of theirs may be
// compiled for a processor that the program may not run on.
#include "kernels.h"

#if FASTMETA_X86
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FASTMETA_ISA avx2
#define FASTMETA_TABLE kAvx2
#define FASTMETA_VECTOR_BYTES 32
#include "isa_tables.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
