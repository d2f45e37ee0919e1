#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "../ddim_op.h"
#include "isa.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace protofast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Where one run of elements starts in each tensor.
template <class T>
struct DdimRun {
  const T *sample, *output, *cond, *noise;
  T *prev, *x0;

  void advance(int64_t count) {
    sample += count, output += count, prev += count;
    if (cond) cond += count;
    if (noise) noise += count;
    if (x0) x0 += count;
  }
};

// One copy of the loops for each instruction set.
#define VECTOR_BYTES 16
namespace plain {
#include "vector.h"
//
#include "ddim_loop.h"
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
#include "vector.h"
//
#include "ddim_loop.h"
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
#include "vector.h"
//
#include "ddim_loop.h"
}  // namespace avx512
#undef VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

template <class T>
auto best_loop() {
#ifdef __x86_64__
  if (cpu_isa() == Isa::avx512) return &avx512::ddim_run<T>;
  if (cpu_isa() == Isa::avx2) return &avx2::ddim_run<T>;
#endif
  return &plain::ddim_run<T>;
}

// Non-temporal stores save the read of the line that is to be overwritten, but push the result out of the cache. They
// pay where it would not stay there anyway, and not where the output is an input, whose lines have been read.
bool should_stream(const DdimArgs& args, size_t element) {
  // Fixed: what sysconf reports may be the cache of the whole socket, of which a virtual machine has a part.
  constexpr int64_t CACHE = int64_t{32} << 20;
  int64_t tensors = 0;
  for (const Operand& in : {args.sample, args.output, args.cond, args.noise}) {
    tensors += in.data != nullptr;
    if (in.data != nullptr && (in.data == args.prev.data || in.data == args.x0.data)) return false;
  }
  tensors += args.x0.data ? 2 : 1;
  return args.batch * args.inner * static_cast<int64_t>(element) * tensors > CACHE;
}

template <class T>
void ddim_step_typed(const DdimArgs& args) {
  const auto loop = best_loop<T>();
  const bool stream = should_stream(args, sizeof(T));
  constexpr int64_t GRAIN = 32768;  // torch's own for pointwise ops
  torch::stable::parallel_for(0, args.batch * args.inner, GRAIN, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t entry = begin / args.inner, offset = begin % args.inner;
      const int64_t count = std::min(end - begin, args.inner - offset);
      const auto at = [&](const Operand& operand) {
        return operand.data ? static_cast<T*>(operand.data) + entry * operand.stride + offset : nullptr;
      };
      loop(args, entry, {at(args.sample), at(args.output), at(args.cond), at(args.noise), at(args.prev), at(args.x0)},
           count, stream);
      begin += count;
    }
  });
}

void launch(const DdimArgs& args) {
  switch (args.dtype) {
    case Dtype::f32:
      return ddim_step_typed<float>(args);
    case Dtype::f64:
      return ddim_step_typed<double>(args);
    case Dtype::bf16:
      return ddim_step_typed<BFloat16>(args);
    case Dtype::f16:
      return ddim_step_typed<Half>(args);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(protofast, CPU, m) {
  m.impl("ddim_step.native", TORCH_BOX(&ddim_step<&launch>));
  m.impl("ddim_step_out.native", TORCH_BOX(&ddim_step_out<&launch>));
}

}  // namespace protofast
