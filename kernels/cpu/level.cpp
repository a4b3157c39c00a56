// What the machine can do.
#include <sys/syscall.h>
#include <unistd.h>

#include "clif_cpu.h"

namespace {

constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

// CPUID leaf 7, EDX: bit 22 AMX with bfloat16, bit 24 tiles. The kernel must agree, once for a process.
bool has_amx() {
    unsigned a = 7, b, c = 0, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (d >> 22 & 1) && (d >> 24 & 1) && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

}  // namespace

CLIF_API int clif_level(void) {
    __builtin_cpu_init();
    if (!has_avx512()) return CLIF_NONE;
    return has_amx() ? CLIF_AMX : CLIF_AVX512;
}

CLIF_API const char *clif_interface(void) { return CLIF_INTERFACE; }
