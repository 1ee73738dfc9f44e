// The CPU kernels for SSE2. Nothing but this project's own code may come after the target is chosen.
#include <cstdint>

#define INFOPRO_ISA baseline
#define INFOPRO_BYTES 16
#define INFOPRO_MR 6

#pragma GCC target("arch=x86-64")
#include "isa.h"
