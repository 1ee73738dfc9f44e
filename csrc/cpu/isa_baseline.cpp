// The CPU kernels for SSE2. Nothing but this project's own code may follow the choice of the target.
#include <cstdint>

#define INFOPRO_ISA baseline
#define INFOPRO_BYTES 16
#define INFOPRO_MR 6

#pragma GCC target("arch=x86-64")
#include "isa.h"
