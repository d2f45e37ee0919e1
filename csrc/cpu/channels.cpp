// Channel purity on the CPU. Neither the instruction set nor the number of threads changes a result.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "../channels_op.h"
#include "threads.h"

namespace protofast {
namespace {

constexpr int64_t PURITY_RUN = 256;  // pixels whose lanes stay in a core's first cache

// The gradients of a pair are scale·(u − pull·f) to the pixel f, and scale·f to the row u.
struct PurityFactor {
  double scale, pull;
};

}  // namespace
}  // namespace protofast

#define LOOPS "channels_loops.h"
#include "each_isa.h"

namespace protofast {
namespace {

// Pairs, samples or rows for a thread, of so many numbers each.
int64_t grain(int64_t numbers) { return std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, numbers)); }

template <class T>
void purity_typed(const ChannelPurity& args) {
  const ChannelPairs& of = args.of;
  const auto run = BEST(purity_pairs<T>);
  parallel(of.samples * of.pairs, grain(of.channels * of.pixels),
           [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

template <class T>
void gradient_typed(const ChannelPurityGradient& args) {
  const ChannelPairs& of = args.of;
  const int64_t count = of.samples * of.pairs;
  std::vector<PurityFactor> factors(count);
  const auto measure = BEST(purity_factors<T>);
  parallel(count, grain(8 * of.channels),
           [&](int64_t begin, int64_t end) { measure(args, factors.data(), begin, end); });
  if (args.to_x.data) {
    const auto run = BEST(purity_features<T>);
    parallel(of.samples, grain(16 * of.channels * of.pairs),
             [&](int64_t begin, int64_t end) { run(args, factors.data(), begin, end); });
  }
  if (!args.to_rotation) return;
  std::vector<int64_t> order(count), starts;
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return of.chosen[i] < of.chosen[j]; });
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || of.chosen[order[i]] != of.chosen[order[i - 1]]) starts.push_back(i);
  const int64_t rows = std::ssize(starts);
  starts.push_back(count);
  const auto run = BEST(purity_rotation<T>);
  parallel(rows, grain(16 * of.channels),
           [&](int64_t begin, int64_t end) { run(args, factors.data(), order.data(), starts.data(), begin, end); });
}

void purity(const ChannelPurity& args) {
  with_type(args.of.dtype, [&]<class T>() { purity_typed<T>(args); });
}

void gradient(const ChannelPurityGradient& args) {
  with_type(args.of.dtype, [&]<class T>() { gradient_typed<T>(args); });
}

constexpr ChannelKernels KERNELS{&purity, &gradient};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(protofast, CPU, m) { register_channels<KERNELS>(m); }

}  // namespace protofast
