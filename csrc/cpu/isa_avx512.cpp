// The CPU kernels for AVX-512. Nothing but this project's own code may follow the choice of the target.
#include <cstdint>

#define INFOPRO_ISA avx512
#define INFOPRO_BYTES 64
#define INFOPRO_MR 12

#pragma GCC target("arch=x86-64-v4")
#include "isa.h"
