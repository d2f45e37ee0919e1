#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../ddim_op.h"

namespace protofast {
namespace {

// Where one run of elements starts in each tensor. S is the sample's dtype, M the prediction's.
template <class S, class M>
struct DdimRun {
  const S *sample, *noise, *known, *known_noise;
  const M *output, *cond;
  const uint8_t* mask;
  S *prev, *x0;
  int64_t element;  // of the batch entry

  void advance(int64_t count) {
    sample += count, output += count, prev += count, element += count;
    if (cond) cond += count;
    if (noise) noise += count;
    if (known) known += count, mask += count;
    if (known_noise) known_noise += count;
    if (x0) x0 += count;
  }
};

}  // namespace
}  // namespace protofast

#define LOOPS "ddim_loops.h"
#include "each_isa.h"

namespace protofast {
namespace {

// Non-temporal stores save the read of the line that is to be overwritten, but push the result out of the cache. They
// pay where it would not stay there anyway, and not where the output is an input, whose lines have been read.
bool should_stream(const DdimArgs& args, size_t element) {
  // Fixed: what sysconf reports may be the cache of the whole socket, of which a virtual machine has a part.
  constexpr int64_t CACHE = int64_t{32} << 20;
  int64_t tensors = 0;
  for (const Operand& in : {args.sample, args.output, args.cond, args.noise, args.known, args.known_noise}) {
    tensors += in.data != nullptr;
    if (in.data != nullptr && (in.data == args.prev.data || in.data == args.x0.data)) return false;
  }
  tensors += args.x0.data ? 2 : 1;
  return args.batch * args.inner * static_cast<int64_t>(element) * tensors > CACHE;
}

// Calls run(entry, first, count) for runs of each entry that begin at multiples of RUN.
template <class Run>
void for_each_run(int64_t batch, int64_t inner, const Run& run) {
  constexpr int64_t RUN = 32768;  // elements; torch's own grain for pointwise ops
  const int64_t runs = (inner + RUN - 1) / RUN;
  if (batch * runs == 1) return run(0, 0, inner);
  torch::stable::parallel_for(0, batch * runs, std::max<int64_t>(1, RUN / inner), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % runs * RUN;
      run(i / runs, first, std::min(RUN, inner - first));
    }
  });
}

template <class S, class M>
void step_typed(const DdimArgs& args) {
  const auto loop = BEST(ddim_run<S, M>);
  const bool stream = should_stream(args, sizeof(S));
  for_each_run(args.batch, args.inner, [&](int64_t entry, int64_t first, int64_t count) {
    const auto at = [&]<class T>(const Operand& operand, T*& to) {
      if (operand.data) to = static_cast<T*>(operand.data) + entry * operand.stride + first;
    };
    DdimRun<S, M> run{};
    at(args.sample, run.sample), at(args.output, run.output), at(args.cond, run.cond), at(args.noise, run.noise);
    at(args.known, run.known), at(args.known_noise, run.known_noise), at(args.mask, run.mask);
    at(args.prev, run.prev), at(args.x0, run.x0);
    run.element = first;
    loop(args, entry, run, count, stream);
  });
}

void step(const DdimArgs& args) {
  switch (args.dtype) {
    case Dtype::f32:
      if (args.output_dtype == Dtype::bf16) return step_typed<float, BFloat16>(args);
      if (args.output_dtype == Dtype::f16) return step_typed<float, Half>(args);
      return step_typed<float, float>(args);
    case Dtype::f64:
      return step_typed<double, double>(args);
    case Dtype::bf16:
      return step_typed<BFloat16, BFloat16>(args);
    case Dtype::f16:
      return step_typed<Half, Half>(args);
  }
}

void coefficients(const CoefficientArgs& args) {
  for (int64_t i = 0; i < args.count; ++i) ddim_coefficients(args, i);
}

template <class T>
void normal_typed(const NormalArgs& args) {
  const auto fill = BEST(normal_run<T>);
  for_each_run(args.batch, args.inner, [&](int64_t entry, int64_t first, int64_t count) {
    fill(args.seed[0], args.seed[1] + static_cast<uint64_t>(entry), first,
         static_cast<T*>(args.out) + entry * args.inner + first, count);
  });
}

void normal(const NormalArgs& args) {
  with_type(args.dtype, [&]<class T>() { normal_typed<T>(args); });
}

constexpr Kernels KERNELS{&step, &coefficients, &normal};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(protofast, CPU, m) { register_ddim<KERNELS>(m); }

}  // namespace protofast
