// Dispersion: choices and swaps, whatever the instruction set. Values and sums are those of the reference to the bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "farthest_plan.h"
#include "selection_allowed.h"
#include "threads.h"

namespace protofast {

// Chosen points, and values from them.
class ChosenPoints {
 public:
  // `entry` reads precomputed distances.
  ChosenPoints(const Cloud& cloud, const PairLoops& loops, double (*entry)(const Cloud&, int64_t, int64_t),
               std::vector<int64_t> positions)
      : cloud_(cloud), loops_(loops), entry_(entry), is_chosen_(cloud.count), width_(cloud.width()) {
    for (const int64_t position : positions) add(position);
  }

  int64_t count() const { return std::ssize(positions_); }
  const std::vector<int64_t>& positions() const { return positions_; }
  int64_t position(int64_t number) const { return positions_[number]; }
  bool has(int64_t position) const { return is_chosen_[position]; }

  void add(int64_t position) {
    positions_.push_back(-1);
    if (!precomputed()) coordinates_.resize(count() * width_);
    set(count() - 1, position);
  }
  void set(int64_t number, int64_t position) {
    if (positions_[number] >= 0) is_chosen_[positions_[number]] = false;
    positions_[number] = position, is_chosen_[position] = true;
    if (!precomputed()) loops_.coordinates(cloud_, position, coordinates_.data() + number * width_);
  }

  double value(int64_t number, int64_t position) const {
    if (precomputed()) return entry_(cloud_, positions_[number], position);
    return loops_.value(cloud_, position, coordinates_.data() + number * width_);
  }
  double between(int64_t number, int64_t other) const { return value(number, positions_[other]); }
  double distance(int64_t number, int64_t position) const {
    return protofast::distance(cloud_.measure, value(number, position));
  }

  const Cloud& cloud() const { return cloud_; }
  const double* coordinates(int64_t number) const { return coordinates_.data() + number * width_; }

 private:
  bool precomputed() const { return cloud_.measure == Measure::precomputed; }

  const Cloud& cloud_;
  const PairLoops& loops_;
  double (*entry_)(const Cloud&, int64_t, int64_t);
  std::vector<int64_t> positions_;
  std::vector<char> is_chosen_;  // by position
  int64_t width_;
  std::vector<double> coordinates_;
};

// Of results of runs over the positions, the first of the largest. find(begin, end) returns the one of a run.
template <class Find>
Key first_largest(int64_t count, int64_t grain, const Find& find) {
  Key best;
  std::mutex mutex;
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    const Key found = find(begin, end);
    const std::lock_guard lock(mutex);
    if (found.over(best)) best = found;
  });
  return best;
}

inline int64_t values_at_once(const Cloud& cloud) {
  return std::max<int64_t>(256, (int64_t{1} << 16) / (cloud.dim + 4));
}

// Swaps an end of the closest chosen pair for the point farthest from the others, while that raises the smallest value.
//
// What is kept of a point is a chosen one that is near and the value to it: a bound on the value of the nearest, which
// is looked for only where it may be the largest of all.
class MaxMinSwapping {
 public:
  // `labels` and `bounds` are by position.
  MaxMinSwapping(ChosenPoints& chosen, std::vector<int32_t> labels, std::vector<double> bounds)
      : chosen_(chosen), labels_(std::move(labels)), bounds_(std::move(bounds)), nearest_(chosen.count()) {
    parallel(chosen.count(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) look(number);
    });
  }

  double smallest() const { return nearest_[closest()].first; }

  void run(int64_t most) {
    const int64_t k = chosen_.count();
    if (k <= 2 || k >= chosen_.cloud().count) return;
    while (most-- > 0) {
      const int64_t one = closest();
      if (nearest_[one].first == 0) return;
      Key best{nearest_[one].first, -1};
      int64_t end = -1;
      const std::pair<int64_t, int64_t> ends = std::minmax(one, nearest_[one].second);
      for (const int64_t number : {ends.first, ends.second}) {
        const double rest = smallest_without(number);
        if (!(rest > best.value)) continue;
        const Key found = farthest_without(number, best.value);
        if (found.position >= 0) best = {std::min(found.value, rest), found.position}, end = number;
      }
      if (end < 0) return;
      swap(end, best.position);
    }
  }

 private:
  using Near = std::pair<double, int64_t>;  // the value, and the number of the chosen point

  int64_t closest() const {
    return std::min_element(nearest_.begin(), nearest_.end(),
                            [](const Near& a, const Near& b) { return a.first < b.first; }) -
           nearest_.begin();
  }

  // The nearest other, the first of equals.
  void look(int64_t number) {
    Near& near = nearest_[number] = {std::numeric_limits<double>::infinity(), chosen_.count()};
    for (int64_t other = 0; other < chosen_.count(); ++other)
      if (other != number) near = std::min(near, {chosen_.between(other, number), other});
  }

  // The smallest value between the chosen points but `end`.
  double smallest_without(int64_t end) const {
    double smallest = std::numeric_limits<double>::infinity();
    for (int64_t number = 0; number < chosen_.count(); ++number) {
      if (number == end) continue;
      if (nearest_[number].second != end) {
        smallest = std::min(smallest, nearest_[number].first);
        continue;
      }
      for (int64_t other = 0; other < chosen_.count(); ++other)
        if (other != end && other != number) smallest = std::min(smallest, chosen_.between(number, other));
    }
    return smallest;
  }

  // The point farthest from the chosen ones but `end`, if its value is over `least`; otherwise position −1.
  Key farthest_without(int64_t end, double least) {
    const int64_t stand_in = nearest_[end].second;
    std::vector<Key> found;
    std::mutex mutex;
    parallel(chosen_.cloud().count, 1 << 14, [&](int64_t begin, int64_t until) {
      std::vector<Key> some;
      for (int64_t i = begin; i < until; ++i) {
        if (labels_[i] != end ? !(bounds_[i] > least) : false) continue;
        const double bound = labels_[i] == end ? chosen_.value(stand_in, i) : bounds_[i];
        if (bound > least && !chosen_.has(i)) some.push_back({bound, i});
      }
      const std::lock_guard lock(mutex);
      found.insert(found.end(), some.begin(), some.end());
    });
    if (found.empty()) return {least, -1};
    std::sort(found.begin(), found.end(), [](const Key& a, const Key& b) { return a.over(b); });
    std::vector<std::pair<double, int64_t>> others;  // those near to `end` are near to its points
    for (int64_t number = 0; number < chosen_.count(); ++number)
      if (number != end) others.emplace_back(chosen_.between(number, end), number);
    std::sort(others.begin(), others.end());

    Key best{least, -1};
    for (const Key& candidate : found) {
      if (best.position < 0 ? !(candidate.value > least) : candidate.value < best.value) break;
      const int64_t i = candidate.position;
      double value = std::numeric_limits<double>::infinity();
      for (const auto& [_, number] : others) {
        const double now = chosen_.value(number, i);
        if (!(now < value)) continue;
        value = now;
        if (labels_[i] != end && value < bounds_[i]) bounds_[i] = value, labels_[i] = static_cast<int32_t>(number);
        if (best.position < 0 ? !(value > least) : value < best.value) break;
      }
      if (best.position < 0 ? value > least : Key{value, i}.over(best)) best = {value, i};
    }
    return best;
  }

  void swap(int64_t end, int64_t position) {
    const int64_t stand_in = nearest_[end].second;
    chosen_.set(end, position);
    parallel(chosen_.cloud().count, 1 << 14, [&](int64_t begin, int64_t until) {
      for (int64_t i = begin; i < until; ++i) {
        if (labels_[i] != end) continue;
        const double old = chosen_.value(stand_in, i), now = chosen_.value(end, i);
        bounds_[i] = std::min(old, now), labels_[i] = static_cast<int32_t>(now < old ? end : stand_in);
      }
    });
    bounds_[position] = 0, labels_[position] = static_cast<int32_t>(end);
    for (int64_t number = 0; number < chosen_.count(); ++number) {
      if (number == end || nearest_[number].second == end)
        look(number);
      else
        nearest_[number] = std::min(nearest_[number], {chosen_.between(end, number), end});
    }
  }

  ChosenPoints& chosen_;
  std::vector<int32_t> labels_;
  std::vector<double> bounds_;
  std::vector<Near> nearest_;  // of the chosen points
};

// Sums of the distances from the chosen points to each, added in the order of choice.
class SumsOfDistances {
 public:
  explicit SumsOfDistances(ChosenPoints& chosen) : chosen_(chosen), sums_(chosen.cloud().count) {
    for (int64_t number = 0; number < chosen.count(); ++number) farthest_ = take(number);
  }

  // Adds the points with the largest sums.
  void choose(int64_t k) {
    while (chosen_.count() < k) {
      STD_TORCH_CHECK(farthest_.position < chosen_.cloud().count, "points hold values that are not finite");
      chosen_.add(farthest_.position);
      farthest_ = take(chosen_.count() - 1);
    }
  }

  // Swaps each for the point that raises the total most, until a sweep changes nothing.
  void sweep(int64_t most) {
    for (bool changed = chosen_.count() < chosen_.cloud().count; changed && most-- > 0;) {
      changed = false;
      for (int64_t number = 0; number < chosen_.count(); ++number) changed |= swap(number);
    }
  }

 private:
  // A distance is at least 0, and subtracting rounds the same way up and down: fl(fl(s − d) − o) ≤ fl(s − o).
  bool swap(int64_t number) {
    const double old = sums_[chosen_.position(number)], least = 1e-12 * old;  // above the rounding of the sums
    const Key best = first_largest(std::ssize(sums_), values_at_once(chosen_.cloud()), [&](int64_t begin, int64_t end) {
      Key best{least, -1};
      for (int64_t i = begin; i < end; ++i) {
        if (!(sums_[i] - old > best.value) || chosen_.has(i)) continue;
        const double gain = sums_[i] - chosen_.distance(number, i) - old;
        if (gain > best.value) best = {gain, i};
      }
      return best.position < 0 ? Key{} : best;
    });
    if (!(best.value > least)) return false;
    each([&](int64_t i) { sums_[i] -= chosen_.distance(number, i); });
    chosen_.set(number, best.position);
    each([&](int64_t i) { sums_[i] += chosen_.distance(number, i); });
    return true;
  }

  // Adds the distances from a chosen point; returns the largest sum of those that are free.
  Key take(int64_t number) {
    return first_largest(std::ssize(sums_), values_at_once(chosen_.cloud()), [&](int64_t begin, int64_t end) {
      Key best;
      for (int64_t i = begin; i < end; ++i) {
        sums_[i] += chosen_.distance(number, i);
        if (sums_[i] > best.value && !chosen_.has(i)) best = {sums_[i], i};
      }
      return best;
    });
  }

  template <class Use>
  void each(const Use& use) const {
    parallel(std::ssize(sums_), values_at_once(chosen_.cloud()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) use(i);
    });
  }

  ChosenPoints& chosen_;
  std::vector<double> sums_;
  Key farthest_;
};

}  // namespace protofast
