// Includes LOOPS, which the file that includes this has defined, once for each instruction set in a namespace of its
// own; BEST(name) is the one of this processor. Once in a file, so without a guard.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "element.h"
#include "isa.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace protofast {
namespace {

#define VECTOR_BYTES 16
namespace plain {
#include LOOPS
}  // namespace plain
#undef VECTOR_BYTES

#ifdef __x86_64__

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define VECTOR_BYTES 32
namespace avx2 {
#include LOOPS
}  // namespace avx2
#undef VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif
#define VECTOR_BYTES 64
namespace avx512 {
#include LOOPS
}  // namespace avx512
#undef VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define BEST(...) \
  (cpu_isa() >= Isa::avx512 ? avx512::__VA_ARGS__ : cpu_isa() == Isa::avx2 ? avx2::__VA_ARGS__ : plain::__VA_ARGS__)

#else
#define BEST(...) (plain::__VA_ARGS__)
#endif

}  // namespace
}  // namespace protofast
