// Swaps of a medoid for another point, as protofast/_ops/selection.py lays them down.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>

#include "medoids_rounding.h"
#include "selection_allowed.h"
#include "threads.h"

namespace protofast {

class MedoidSwaps {
 public:
  MedoidSwaps(const Cloud& cloud, const MedoidsLoops& loops, int64_t* medoids, int64_t k)
      : cloud_(cloud),
        loops_(loops),
        medoids_(medoids),
        k_(k),
        n_(cloud.count),
        room_((n_ + 7) / 8 * 8),
        panel_(cloud, precomputed() ? 0 : n_),
        row_(room_),
        stood_(k) {
    if (!precomputed())
      parallel(panel_.groups, panel_.grain(),
               [&](int64_t begin, int64_t end) { loops_.fill(cloud_, nullptr, panel_, begin, end); });
    if (!precomputed() && panel_.dim > 8) round();
    for (int side = 0; side < 2; ++side) {
      value_[side].assign(n_, std::numeric_limits<double>::infinity());
      label_[side].assign(n_, side == 0 ? 0 : -1), distance_[side].resize(n_);
    }
  }

  // At most so many passes over the points; returns whether a whole pass has found no swap.
  bool run(int64_t passes) {
    std::vector<char> taken(n_);
    for (int64_t m = 0; m < k_; ++m) {
      taken[medoids_[m]] = true;
      values_of(medoids_[m]);
      for (int64_t o = 0; o < n_; ++o) insert(o, row_[o], static_cast<int32_t>(m));
    }
    for (int64_t o = 0; o < n_; ++o) measure(o);
    refresh();
    const int64_t last = passes * n_, threads = thread_count();
    int64_t since = 0;
    for (int64_t step = 0; step < last && since < n_;) {
      // A swap makes what comes after it stale, but for the lengths of the screen.
      const int64_t wanted = rounding_ ? loops_.rows * std::max<int64_t>(2, threads)
                                       : std::clamp<int64_t>(since / 4, threads, 32 * threads);
      std::vector<Candidate> some(std::min({last - step, n_ - since, wanted}));
      for (int64_t i = 0; i < std::ssize(some); ++i) some[i].point = (step + i) % n_;
      if (rounding_) measure_lengths(some);
      look(some, 0);
      int64_t i = 0;
      while (i < std::ssize(some)) {
        Candidate& one = some[i++];
        ++since;
        if (taken[one.point] || !one.may_pay) continue;
        if (rounding_) decide_exactly(one);
        if (!(one.change < -LEAST_GAIN * (loss_ + stood_[one.out]))) continue;
        taken[medoids_[one.out]] = false, taken[one.point] = true;
        swap(one.point, one.out);
        since = 0;
        if (!rounding_) break;
        look(some, i);
      }
      step += i;
    }
    return since >= n_;
  }

 private:
  struct Candidate {
    int64_t point, out;
    double change;  // of the sum, where the point takes the place of medoid `out`
    bool may_pay;
  };
  static constexpr double LEAST_GAIN = 1e-10;
  static constexpr double MOST = 1e290;  // MOST_DISTANCE

  bool precomputed() const { return cloud_.measure == Measure::precomputed; }

  // The two nearest medoids by value; of equals those that came first.
  void insert(int64_t o, double value, int32_t medoid) {
    if (value < value_[0][o]) {
      value_[1][o] = value_[0][o], label_[1][o] = label_[0][o];
      value_[0][o] = value, label_[0][o] = medoid;
    } else if (value < value_[1][o]) {
      value_[1][o] = value, label_[1][o] = medoid;
    }
  }

  void measure(int64_t o) {
    for (int side = 0; side < 2; ++side) distance_[side][o] = std::min(MOST, distance(cloud_.measure, value_[side][o]));
    if (rounding_)
      reach_[o] = static_cast<float>(cloud_.length(value_[1][o]) * rounding_->scale()) * (1 + 1e-6F) + 1e-15F;
  }

  void values_of(int64_t position) {
    if (precomputed()) return loops_.row(cloud_, position, 0, n_, row_.data());
    std::vector<double> x(cloud_.width());
    loops_.coordinates(cloud_, position, x.data());
    parallel(panel_.groups, panel_.grain(),
             [&](int64_t begin, int64_t end) { loops_.values(panel_, x.data(), begin, end, row_.data()); });
  }

  // What the sum grows by without each medoid, and the sum.
  void refresh() {
    std::fill(stood_.begin(), stood_.end(), 0.0);
    for (int64_t o = 0; o < n_; ++o) stood_[label_[0][o]] += distance_[1][o] - distance_[0][o];
    std::vector<double> lanes(SUM_LANES);
    loops_.add(distance_[0].data(), 0, n_, lanes.data());
    loss_ = loops_.sum(lanes.data());
  }

  // Points in float32, where squares stay within the range of float64.
  void round() {
    std::vector<double> ones(room_, 1);
    mean_.resize(panel_.dim);
    const std::vector<double> zero(panel_.dim);
    loops_.pull(panel_, zero.data(), ones.data(), 0, 0, panel_.groups, mean_.data());
    for (double& c : mean_) c /= -static_cast<double>(n_);
    loops_.values(panel_, mean_.data(), 0, panel_.groups, row_.data());
    const double farthest = *std::max_element(row_.begin(), row_.begin() + n_);
    if (!(farthest < 1e240 && farthest > 1e-240)) return;
    rounding_ = std::make_unique<MemberRounding>(panel_, loops_, mean_.data(), cloud_.length(farthest));
    rounded_ = rounding_->all(nullptr, false);
    missed_ = 2 * rounding_->missed(cloud_.length(farthest));
    stride_ = (n_ + loops_.panel - 1) / loops_.panel * loops_.panel;
    reach_.assign(stride_, -1);  // nothing is so near as to count for what pads the last panel
  }

  void measure_lengths(const std::vector<Candidate>& some) {
    const int64_t height = std::ssize(some);
    const auto rows = rounding_->rows(height);
    for (int64_t i = 0; i < height; ++i) rounding_->write(some[i].point, i, rows.get(), nullptr);
    lengths_.resize(height * stride_);
    parallel(stride_ / loops_.panel, 1 + (1 << 14) / (height * rounded_.depth), [&](int64_t begin, int64_t end) {
      loops_.lengths(rounded_, rows.get(), height, begin, end, lengths_.data(), stride_);
    });
  }

  // Whether a swap of one of those from `first` on may pay.
  void screen(std::vector<Candidate>& some, int64_t first) const {
    const auto shrink = static_cast<float>(1 - rounded_.off(8)), missed = static_cast<float>(missed_) * (1 + 1e-6F);
    const double by = (1 - static_cast<double>(panel_.dim + 16) * 0x1p-52) / rounding_->scale();
    const ScreenedGains with{cloud_.measure,      shrink,          missed, by, reach_.data(), distance_[0].data(),
                             distance_[1].data(), label_[0].data()};
    const double least = LEAST_GAIN - 8 * static_cast<double>(n_ + 16) * 0x1p-53;
    parallel(std::ssize(some) - first, 1 + (1 << 16) / n_, [&](int64_t begin, int64_t end) {
      std::vector<double> spared(k_);
      for (int64_t i = first + begin; i < first + end; ++i) {
        std::fill(spared.begin(), spared.end(), 0.0);
        const double gain = loops_.most_gains(with, lengths_.data() + i * stride_, stride_, spared.data());
        some[i].may_pay = false;
        for (int64_t m = 0; m < k_; ++m) some[i].may_pay |= stood_[m] - spared[m] - gain < -least * (loss_ + stood_[m]);
      }
    });
  }

  void decide_exactly(Candidate& one) {
    std::vector<double> x(cloud_.width()), lanes(SUM_LANES), spared(k_);
    loops_.coordinates(cloud_, one.point, x.data());
    parallel(panel_.groups, panel_.grain(),
             [&](int64_t begin, int64_t end) { loops_.distances(panel_, x.data(), begin, end, row_.data()); });
    loops_.gains(row_.data(), distance_[0].data(), distance_[1].data(), label_[0].data(), 0, n_, lanes.data(),
                 spared.data());
    decide(one, lanes.data(), spared.data());
  }

  // What a swap of each from `first` on would change; or, with the screen, whether it may pay.
  void look(std::vector<Candidate>& some, int64_t first) const {
    if (rounding_) return screen(some, first);
    constexpr int64_t TOGETHER = 4;
    const int64_t work = n_ * (panel_.dim + 8), least = std::ssize(some) > 2 * TOGETHER ? TOGETHER : 1;
    parallel(std::ssize(some), std::max(least, (int64_t{1} << 17) / work), [&](int64_t begin, int64_t end) {
      const int64_t width = cloud_.width();
      std::vector<double> x(TOGETHER * width), row(room_), lanes(TOGETHER * SUM_LANES), spared(TOGETHER * k_);
      for (; begin < end; begin += TOGETHER) {
        const int64_t many = std::min(TOGETHER, end - begin);
        std::fill(lanes.begin(), lanes.end(), 0.0), std::fill(spared.begin(), spared.end(), 0.0);
        if (!precomputed())
          for (int64_t i = 0; i < many; ++i) loops_.coordinates(cloud_, some[begin + i].point, x.data() + i * width);
        const int64_t step = precomputed() ? n_ : 8 * panel_.groups_at_once();
        for (int64_t first = 0; first < n_; first += step) {
          const int64_t count = std::min(step, n_ - first);
          for (int64_t i = 0; i < many; ++i) {
            if (precomputed())
              loops_.row(cloud_, some[begin + i].point, first, first + count, row.data());
            else
              loops_.distances(panel_, x.data() + i * width, first / 8, (first + count + 7) / 8, row.data());
            loops_.gains(row.data(), distance_[0].data(), distance_[1].data(), label_[0].data(), first, count,
                         lanes.data() + i * SUM_LANES, spared.data() + i * k_);
          }
        }
        for (int64_t i = 0; i < many; ++i)
          decide(some[begin + i], lanes.data() + i * SUM_LANES, spared.data() + i * k_);
      }
    });
  }

  // The medoid to leave.
  void decide(Candidate& one, double* lanes, const double* spared) const {
    const double gain = loops_.sum(lanes);
    one.may_pay = true;
    for (int64_t m = 0; m < k_; ++m) {
      const double change = stood_[m] - spared[m] - gain;
      if (m == 0 || change < one.change) one.change = change, one.out = m;
    }
  }

  void swap(int64_t point, int64_t out) {
    medoids_[out] = point;
    values_of(point);
    const auto now = static_cast<int32_t>(out);
    std::vector<int64_t> stale;
    for (int64_t o = 0; o < n_; ++o) {
      if (label_[0][o] == now || label_[1][o] == now)
        stale.push_back(o);
      else if (row_[o] < value_[1][o])
        insert(o, row_[o], now), measure(o);
    }
    for (const int64_t o : stale) {
      value_[0][o] = value_[1][o] = std::numeric_limits<double>::infinity();
      label_[0][o] = 0, label_[1][o] = -1;
    }
    again(stale);
    refresh();
  }

  // Points whose nearest medoids may be any.
  void again(const std::vector<int64_t>& stale) {
    const int64_t count = std::ssize(stale);
    if (count == 0) return;
    std::vector<double> values((count + 7) / 8 * 8);
    Panel few(cloud_, precomputed() ? 0 : count);
    if (!precomputed())
      parallel(few.groups, few.grain(),
               [&](int64_t begin, int64_t end) { loops_.fill(cloud_, stale.data(), few, begin, end); });
    std::vector<double> x(cloud_.width());
    for (int64_t m = 0; m < k_; ++m) {
      if (precomputed()) {
        for (int64_t i = 0; i < count; ++i)
          loops_.row(cloud_, medoids_[m], stale[i], stale[i] + 1, values.data() - stale[i] + i);
      } else {
        loops_.coordinates(cloud_, medoids_[m], x.data());
        parallel(few.groups, few.grain(),
                 [&](int64_t begin, int64_t end) { loops_.values(few, x.data(), begin, end, values.data()); });
      }
      for (int64_t i = 0; i < count; ++i) insert(stale[i], values[i], static_cast<int32_t>(m));
    }
    for (const int64_t o : stale) measure(o);
  }

  const Cloud& cloud_;
  const MedoidsLoops& loops_;
  int64_t* const medoids_;
  const int64_t k_, n_, room_;
  Panel panel_;
  std::vector<double> row_;
  std::vector<double> value_[2], distance_[2];  // of the nearest medoid and the second
  std::vector<int32_t> label_[2];
  std::vector<double> stood_;
  double loss_ = 0;
  std::vector<double> mean_;
  std::unique_ptr<MemberRounding> rounding_;  // where there is a screen
  RoundedMembers rounded_{};
  double missed_ = 0;                   // what rounding takes from a scaled length at most
  int64_t stride_ = 0;                  // of the lengths: whole panels
  std::vector<float> reach_, lengths_;  // scaled: of the second nearest medoid, at most; from the candidates
};

}  // namespace protofast
