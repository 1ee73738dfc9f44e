// The CPU kernels for AVX2 and FMA. Nothing but this project's own code may follow the choice of the target.
#include <cstdint>

#define INFOPRO_ISA avx2
#define INFOPRO_BYTES 32
#define INFOPRO_MR 6

#pragma GCC target("arch=x86-64-v3")
#include "isa.h"
