// The medoid of a cluster: which sums of distances to take, whatever the instruction set.
//
// Sums that are nearly right, with a bound on what they are off, leave few members whose sum is taken to the bit. Of
// squares, and of each coordinate's gaps once it is sorted, all members' sums take one pass; a sum of euclidean lengths
// is convex, so that its slope at a member bounds it everywhere (Kelley's cutting planes), which in few dimensions
// leaves few members; what is left is for the tiles.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>

#include "medoids_rounding.h"
#include "threads.h"

namespace protofast {

class MedoidSearch {
 public:
  // The members are positions in ascending order.
  MedoidSearch(const Cloud& cloud, const MedoidsLoops& loops, const int64_t* members, int64_t count)
      : cloud_(cloud), loops_(loops), members_(members), count_(count) {}

  int64_t run() {
    if (count_ == 1) return members_[0];
    if (cloud_.measure == Measure::precomputed) return members_[by_rows()];
    panel_ = std::make_unique<Panel>(cloud_, count_);
    fill();
    lower_.assign(count_, 0), gone_.assign(count_, false);
    if (count_ >= 32 && middle()) {
      if (cloud_.measure != Measure::euclidean && !cloud_.manhattan())
        by_squares();
      else if (cloud_.manhattan() && sorting_pays())
        by_sorting();
      else if (cloud_.manhattan() || !by_planes())
        by_tiles();
    }
    finish();
    return members_[best_];
  }

 private:
  static constexpr double UNIT = 0x1p-53;

  int64_t by_rows() const {
    std::vector<double> sums(count_);
    parallel(count_, 1 + (1 << 16) / count_, [&](int64_t begin, int64_t end) {
      std::vector<double> lanes(SUM_LANES);
      for (int64_t i = begin; i < end; ++i)
        sums[i] = loops_.row_sum(cloud_, members_[i], members_, count_, lanes.data());
    });
    return std::min_element(sums.begin(), sums.end()) - sums.begin();
  }

  template <class Run>
  void each_group(const Run& run) const {
    parallel(panel_->groups, panel_->grain(), run);
  }

  void fill() {
    each_group([&](int64_t begin, int64_t end) { loops_.fill(cloud_, members_, *panel_, begin, end); });
  }

  // Σ (x − y) / distance over all members.
  std::vector<double> pull(const double* x, const double* distances, double least) const {
    std::vector<double> g(panel_->dim);
    std::mutex mutex;
    each_group([&](int64_t begin, int64_t end) {
      std::vector<double> part(panel_->dim);
      loops_.pull(*panel_, x, distances, least, begin, end, part.data());
      const std::lock_guard lock(mutex);
      for (int64_t c = 0; c < panel_->dim; ++c) g[c] += part[c];
    });
    return g;
  }

  // Where the members are; returns whether bounds hold there: whether squares stay within the range of float64.
  bool middle() {
    const int64_t room = panel_->groups * 8;
    ones_.assign(room, 1), values_.resize(room);
    mean_.assign(panel_->dim, 0);
    mean_ = pull(mean_.data(), ones_.data(), 0);
    for (double& c : mean_) c /= -static_cast<double>(count_);
    each_group([&](int64_t begin, int64_t end) { loops_.values(*panel_, mean_.data(), begin, end, values_.data()); });
    farthest_ = *std::max_element(values_.begin(), values_.begin() + count_);
    total_ = std::accumulate(values_.begin(), values_.begin() + count_, 0.0);
    return farthest_ < 1e240 && farthest_ > 1e-240;
  }

  // What sums of so many terms, and the values in them, round away at most, per unit of their size.
  double rounding() const { return static_cast<double>(count_ + panel_->dim + 16) * UNIT; }

  // Σ_j |y_i − y_j|² = m |y_i|² + Σ |y_j|² − 2 y_i · Σ y_j
  void by_squares() {
    std::vector<double> dot(values_.size()), size(values_.size());
    const auto g = pull(mean_.data(), ones_.data(), 0);
    each_group([&](int64_t begin, int64_t end) {
      loops_.slopes(*panel_, mean_.data(), g.data(), begin, end, dot.data(), size.data());
    });
    const double by = cloud_.cosine() ? 0.5 : 1, off = 16 * rounding();
    for (int64_t i = 0; i < count_; ++i) {
      const double both = static_cast<double>(count_) * values_[i] + total_;
      lower_[i] = by * (both + 2 * dot[i] - off * both);
    }
  }

  bool sorting_pays() const {
    const double depth = static_cast<double>((panel_->dim + loops_.lanes - 1) / loops_.lanes * loops_.lanes + 8);
    const double tiles = depth * static_cast<double>(count_) / 2 * 1.5 / static_cast<double>(loops_.lanes);
    return static_cast<double>(panel_->dim) * 12 * std::log2(static_cast<double>(count_)) < tiles;
  }

  // Each coordinate by itself: in ascending order, Σ_j |v_i − v_j| = v_i (2i + 2 − m) + Σ v − 2 Σ_{j≤i} v_j.
  void by_sorting() {
    const double many = static_cast<double>(count_);
    std::mutex mutex;
    std::fill(lower_.begin(), lower_.end(), 0.0);
    parallel(panel_->dim, 1 + (1 << 13) / count_, [&](int64_t begin, int64_t end) {
      std::vector<std::pair<double, int64_t>> sorted(count_);
      std::vector<double> sums(count_);
      for (int64_t c = begin; c < end; ++c) {
        double all = 0, before = 0;
        for (int64_t i = 0; i < count_; ++i) {
          const double v = panel_->group(i / 8)[c * 8 + i % 8] - mean_[c];
          sorted[i] = {v, i}, all += v;
        }
        std::sort(sorted.begin(), sorted.end());
        for (int64_t i = 0; i < count_; ++i) {
          const auto [v, member] = sorted[i];
          before += v;
          sums[member] += v * (static_cast<double>(2 * i + 2) - many) + all - 2 * before;
        }
      }
      const std::lock_guard lock(mutex);
      for (int64_t i = 0; i < count_; ++i) lower_[i] += sums[i];
    });
    const double off = 16 * rounding();
    for (int64_t i = 0; i < count_; ++i) lower_[i] -= off * (many * values_[i] + total_);
  }

  // Returns whether no other member is left.
  bool by_planes() {
    if (count_ < 256) return false;
    constexpr int ROUNDS = 8;  // after which it is asked whether they paid
    std::vector<double> dot(values_.size()), size(values_.size());
    int64_t left = count_, before = count_;
    int64_t next = std::min_element(values_.begin(), values_.begin() + count_) - values_.begin();
    const double off = 2 * rounding(), many = static_cast<double>(count_);
    for (int round = 1;; ++round) {
      const double sum = evaluate(next);
      const auto g = pull(point_.data(), distances_.data(), 1e-140);
      each_group([&](int64_t begin, int64_t end) {
        loops_.slopes(*panel_, point_.data(), g.data(), begin, end, dot.data(), size.data());
      });
      left = 0;
      for (int64_t i = 0; i < count_; ++i) {
        const double bound = sum + dot[i] - off * (sum + many * size[i]);
        lower_[i] = std::max(lower_[i], bound);
        if (!open(i)) continue;
        if (left++ == 0 || lower_[i] < lower_[next]) next = i;
      }
      if (left == 0) return true;
      if (round % ROUNDS) continue;
      if (before - left < ROUNDS * 16 && (round > ROUNDS || panel_->dim > 8)) return left < 64;
      before = left;
    }
  }

  bool open(int64_t i) const { return !gone_[i] && lower_[i] <= sum_; }

  void by_tiles() {
    std::vector<int64_t> order(count_);
    std::iota(order.begin(), order.end(), 0);
    const int64_t left =
        std::stable_partition(order.begin(), order.end(), [&](int64_t i) { return open(i); }) - order.begin();
    const MemberRounding rounding(*panel_, loops_, mean_.data(), cloud_.length(farthest_));
    const RoundedMembers rounded = rounding.all(order.data(), true);
    std::vector<double> sums(count_);
    const int64_t blocks = (left + TILE_BLOCK - 1) / TILE_BLOCK;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    const bool many_lengths = left * count_ * rounded.depth > (1 << 22);
    parallel(many_lengths ? std::min(thread_count(), blocks) : 1, 1, [&](int64_t, int64_t) {
      std::vector<double> part(count_);
      for (int64_t block; (block = next++) < blocks;) loops_.tiles(rounded, block, left, part.data());
      const std::lock_guard lock(mutex);
      for (int64_t i = 0; i < count_; ++i) sums[i] += part[i];
    });
    const double off = rounded.off(40) + 2 * this->rounding(), many = static_cast<double>(count_);
    double all_missed = 0;
    for (int64_t i = 0; i < count_; ++i) all_missed += rounding.missed(cloud_.length(values_[i]));
    for (int64_t at = 0; at < left; ++at) {
      const int64_t i = order[at];
      const double missed = many * rounding.missed(cloud_.length(values_[i])) + all_missed;
      lower_[i] = std::max(lower_[i], (sums[at] * (1 - off) - missed) / rounding.scale());
    }
  }

  // Takes the sum of a member to the bit; its copies have the same.
  double evaluate(int64_t i) {
    const int64_t room = panel_->groups * 8;
    distances_.resize(room), point_.resize(cloud_.width()), lanes_.assign(SUM_LANES, 0);
    loops_.coordinates(cloud_, members_[i], point_.data());
    each_group(
        [&](int64_t begin, int64_t end) { loops_.distances(*panel_, point_.data(), begin, end, distances_.data()); });
    loops_.add(distances_.data(), 0, count_, lanes_.data());
    const double sum = loops_.sum(lanes_.data());
    int64_t first = i;
    gone_[i] = true;
    for (int64_t j = count_ - 1; j >= 0; --j)
      if (distances_[j] == 0 && lower_[j] <= sum) gone_[j] = true, first = std::min(first, j);
    if (best_ < 0 || sum < sum_ || (sum == sum_ && first < best_)) sum_ = sum, best_ = first;
    return sum;
  }

  void finish() {
    std::vector<int64_t> order;
    for (int64_t i = 0; i < count_; ++i)
      if (open(i)) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lower_[a] < lower_[b]; });
    for (const int64_t i : order)
      if (open(i)) evaluate(i);
  }

  const Cloud& cloud_;
  const MedoidsLoops& loops_;
  const int64_t* const members_;
  const int64_t count_;
  std::unique_ptr<Panel> panel_;
  std::vector<double> ones_, mean_, values_;  // values from the mean
  double farthest_ = 0, total_ = 0;
  std::vector<double> lower_;                      // bounds on the sums
  std::vector<bool> gone_;                         // whose sum has been taken
  std::vector<double> point_, distances_, lanes_;  // of the last member that was
  int64_t best_ = -1;
  double sum_ = std::numeric_limits<double>::infinity();
};

}  // namespace protofast
