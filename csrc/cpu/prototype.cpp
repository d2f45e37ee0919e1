#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "../prototype_op.h"
#include "prototype_plan.h"
#include "threads.h"

namespace protofast {
namespace {

// How gradients are divided among threads, and what they share.
struct GradientPlan {
  int64_t window, padded, groups;  // pixels of a window; channels, filled up; groups of samples
  const void* p;                   // prototypes (prototype, pixel, padded channel)
  void* to_p;                      // their gradient, (group, prototype, pixel, padded channel)
  void* factors;                   // of each winner
};

}  // namespace
}  // namespace protofast

#define LOOPS "prototype_loops.h"
#include "each_isa.h"

namespace protofast {
namespace {

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Bytes find the winner of the direct form, and so need no precision; what they cannot do, or a processor lacks, is
// done in float32.
template <class T>
Screen screen(const PrototypeSearch& args) {
  constexpr int64_t MOST = 60000;  // products of bytes that 32 bits hold
  const Isa isa = cpu_isa();
  if (sizeof(RealOf<T>) == 8) return Screen::real;
  if (args.precision == BF16 && isa >= Isa::avx512bf16) return Screen::pairs;
  if (args.precision == AUTO && isa >= Isa::avx512vnni && args.shape.topk == 1 &&
      args.shape.channels * args.shape.window() <= MOST)
    return Screen::bytes;
  return Screen::real;
}

template <class T>
void search_typed(const PrototypeSearch& args) {
  using Real = RealOf<T>;
  const PrototypeShape& shape = args.shape;
  const SearchPlan plan(shape, thread_count(), BEST(panel_size<Real>()), sizeof(Real));
  const int64_t rows = shape.samples * shape.prototypes, winners = plan.parts * rows * shape.topk;
  const Winners found{static_cast<double*>(args.scratch(winners * sizeof(double))),
                      static_cast<int64_t*>(args.scratch(winners * sizeof(int64_t))), shape.topk};
  const Screen kind = screen<T>(args);
  const auto search = BEST(search_tasks<T>);
  torch::stable::parallel_for(0, plan.tasks(), 1,
                              [&](int64_t begin, int64_t end) { search(args, plan, found, kind, begin, end); });
  const auto write = BEST(finish<Real>);
  torch::stable::parallel_for(0, rows, 4096,
                              [&](int64_t begin, int64_t end) { write(args, found, plan.parts, begin, end); });
}

template <class T>
void map_typed(const PrototypeMap& args) {
  using Real = RealOf<T>;
  const SearchPlan plan(args.shape, thread_count(), BEST(panel_size<Real>()), sizeof(Real));
  const auto map = BEST(map_tasks<T>);
  torch::stable::parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) { map(args, plan, begin, end); });
}

template <class T>
void gradient_typed(const PrototypeGradient& args) {
  using Real = RealOf<T>;
  const PrototypeShape& shape = args.shape;
  const int64_t lanes = BEST(LANES<Real>), run = lanes * BEST(CHANNELS);
  GradientPlan plan{};
  plan.window = shape.window();
  plan.padded = (shape.channels + lanes - 1) / lanes * lanes;
  const int64_t runs = (plan.padded + run - 1) / run, rows = shape.prototypes * plan.window;
  // A number that the shape fixes, so that the sums do not depend on the threads.
  plan.groups = std::clamp<int64_t>(8 / runs, 1, shape.samples);
  plan.factors = args.scratch(shape.samples * shape.prototypes * shape.topk * 4 * sizeof(Real));
  const bool as_is = std::is_same_v<T, Real> && plan.window == 1 && plan.padded == shape.channels;
  plan.p = as_is ? args.p : args.scratch(rows * plan.padded * sizeof(Real));
  if (args.to_p)
    plan.to_p = as_is && plan.groups == 1 ? args.to_p : args.scratch(plan.groups * rows * plan.padded * sizeof(Real));
  const auto parallel = [&](int64_t count, auto work) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { work(args, plan, begin, end); });
  };
  parallel(shape.samples, BEST(winner_factors<T>));
  if (!as_is) parallel(shape.prototypes, BEST(unpack_prototypes<T>));
  parallel(runs * plan.groups, BEST(gradient_items<T>));
  if (args.to_p && plan.to_p != args.to_p) parallel(shape.prototypes, BEST(pack_gradient<T>));
}

void search(const PrototypeSearch& args) {
  with_type(args.dtype, [&]<class T>() { search_typed<T>(args); });
}

void gradient(const PrototypeGradient& args) {
  with_type(args.dtype, [&]<class T>() { gradient_typed<T>(args); });
}

void map(const PrototypeMap& args) {
  with_type(args.dtype, [&]<class T>() { map_typed<T>(args); });
}

constexpr PrototypeKernels KERNELS{&search, &gradient, &map};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(protofast, CPU, m) { register_prototype<KERNELS>(m); }

}  // namespace protofast
