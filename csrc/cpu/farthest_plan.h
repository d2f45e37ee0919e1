// What the search for the farthest pair works on, whatever the instruction set.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "selection_plan.h"

namespace protofast {

// The best pair so far: of equals the lexicographically first.
class BestPair {
 public:
  double value() const { return value_.load(std::memory_order_relaxed); }
  // Once no thread searches any more.
  std::pair<int64_t, int64_t> pair() const { return pair_; }

  void offer(int64_t a, int64_t b, double value) {
    if (value < this->value()) return;
    const std::pair<int64_t, int64_t> pair = std::minmax(a, b);
    const std::lock_guard lock(mutex_);
    if (value > this->value() || (value == this->value() && pair < pair_))
      pair_ = pair, value_.store(value, std::memory_order_relaxed);
  }

 private:
  std::atomic<double> value_{-1};
  std::pair<int64_t, int64_t> pair_{0, 0};
  std::mutex mutex_;
};

// Near points: `count` from slot `first` on, those far from the center first.
struct PairCell {
  int64_t first, count;
  float norm, reach, missed;  // the largest distance from the center, from the cell's middle, and lost to rounding
  double angle;               // the largest with the middle, seen from the center
};

// Points whose pairs are to be looked at, in cells, with lengths in units of `scale`. A panel of slots has one cell of
// the cloud's coordinates (four bytes, or a float, or a double) after another, for all its slots.
struct PairPlan {
  enum class Form { exact, floats, bytes };

  Form form;
  int64_t dim, depth;  // of rounded coordinates: with zeros to a multiple of a panel's
  bool manhattan;
  double scale;               // a power of two
  std::vector<double> shift;  // (width): a rounded coordinate is x · scale + shift
  int64_t panel;              // slots
  std::vector<PairCell> cells;
  std::vector<float> middles;         // (cells, depth)
  std::vector<int64_t> positions;     // of slots
  std::vector<float> norms, missed;   // of slots: from the center at most; what rounding took away at most
  std::vector<float> steps, squares;  // of slots, for bytes
  std::vector<int32_t> starts;        // of slots, for bytes: −128 · their sum
  std::unique_ptr<void, void (*)(void*)> data{nullptr, nullptr};

  template <class N>
  N* panels() const {
    return static_cast<N*>(data.get());
  }
};

// The loops of one element type and instruction set.
struct PairLoops {
  void (*coordinates)(const Cloud&, int64_t position, double* to);
  void (*norms)(const Cloud&, double* norms, int64_t begin, int64_t end);
  double (*value)(const Cloud&, int64_t position, const double* center);
  // Values of [begin, end) to a center, unless `to` is null, and the largest.
  Key (*values)(const Cloud&, const double* center, int64_t begin, int64_t end, double* to);
  float (*round)(const Cloud&, const PairPlan&, int64_t position, float* to);
  float (*gap)(const float* a, const float* b, int64_t depth, bool manhattan);
  double (*angle)(const float* a, const float* b, int64_t depth);
  void (*pack)(const Cloud&, PairPlan&, const PairCell&, const float* rows, const int64_t* row_of_slot);
  void (*search)(const Cloud&, const PairPlan&, BestPair&, std::atomic<int64_t>& next);
  int64_t panel;  // slots, where coordinates are rounded
};

}  // namespace protofast
