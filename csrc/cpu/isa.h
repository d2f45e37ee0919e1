// The instruction set of the CPU kernels, chosen once, at run time.
#pragma once

namespace protofast {

enum class Isa { plain, avx2, avx512, avx512vnni, avx512bf16 };

// The best this processor has. The environment variable PROTOFAST_CPU_ISA (plain, avx2, avx512, avx512vnni, avx512bf16)
// can lower it: the tests run every variant that way.
Isa cpu_isa();

const char* name(Isa isa);

}  // namespace protofast
