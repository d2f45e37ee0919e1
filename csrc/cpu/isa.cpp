#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace protofast {
namespace {

Isa detect() {
  Isa best = Isa::plain;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = !__builtin_cpu_supports("avx512vnni")  ? Isa::avx512
             : __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16
                                                    : Isa::avx512vnni;
  }
#endif
  if (const char* wanted = std::getenv("PROTOFAST_CPU_ISA"))
    for (Isa isa : {Isa::plain, Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::avx512bf16})
      if (std::strcmp(wanted, name(isa)) == 0) best = std::min(best, isa);
  return best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "plain";
  }
}

}  // namespace protofast
