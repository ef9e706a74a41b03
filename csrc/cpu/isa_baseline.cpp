// The CPU kernels in the instruction set that every processor of the platform has.
#define FASTMETA_ISA baseline
#define FASTMETA_TABLE kBaseline
#define FASTMETA_VECTOR_BYTES 16
#include "isa_tables.h"
