// Farthest-first traversal: which points to look at, whatever the instruction set.
#pragma once

#include <algorithm>
#include <bit>
#include <mutex>
#include <numeric>
#include <vector>

#include "selection_plan.h"
#include "threads.h"

namespace protofast {

// The loops of one element type and instruction set.
struct SelectionLoops {
  void (*coordinates)(const Cloud&, int64_t position, double* to);
  void (*norms)(const Cloud&, double* norms, int64_t begin, int64_t end);
  Key (*measure)(const Cloud&, const double* center, int64_t number, const int64_t* list, int64_t begin, int64_t end,
                 const Nearest&);
  void (*round)(const Rounding&, Centers&);
  void (*meet)(const Cloud&, const Rounding&, const Centers&, const Nearest&, const int64_t* positions, const Meeting*,
               int64_t begin, int64_t end);
  void (*between)(const Centers&, bool manhattan, int64_t from, int64_t begin, int64_t end, double* to);
};

// Points and the centers they have met so far.
class Covering {
 public:
  Covering(const Cloud& cloud, const SelectionLoops& loops, const Nearest& near, int64_t most, bool bytes, bool wide)
      : cloud_(cloud), loops_(loops), near_(near), centers_(most, cloud.width()), wide_(wide) {
    rounding_.dim = cloud.dim, rounding_.manhattan = cloud.manhattan(), rounding_.bytes = bytes;
  }

  const Cloud& cloud() const { return cloud_; }
  const Nearest& near() const { return near_; }
  Centers& centers() { return centers_; }

  double* add() {
    centers_.coordinates.resize(++centers_.count * centers_.width);
    return centers_.coordinates.data() + (centers_.count - 1) * centers_.width;
  }
  // The last center's position is left out from now on.
  void leave(int64_t position) const { near_.leave(position, centers_.count - 1); }
  void add(int64_t position) { loops_.coordinates(cloud_, position, add()); }

  // The last center against all positions; returns the farthest.
  Key measure_all() { return measure_all(centers_.count - 1, near_); }
  Key measure_all(int64_t number, const Nearest& near) {
    const double* const center = centers_.at(number);
    Key best;
    std::mutex mutex;
    parallel(cloud_.count, std::max<int64_t>(256, (int64_t{1} << 16) / (cloud_.dim + 4)),
             [&](int64_t begin, int64_t end) {
               const Key found = loops_.measure(cloud_, center, number, nullptr, begin, end, near);
               const std::lock_guard lock(mutex);
               if (found.over(best)) best = found;
             });
    return best;
  }

  Key measure(const std::vector<int64_t>& list) const {
    const int64_t number = centers_.count - 1;
    return loops_.measure(cloud_, centers_.at(number), number, list.data(), 0, std::ssize(list), near_);
  }

  // Chooses how to round, from values that no two points exceed twice.
  void set_scale(double farthest) {
    const double reach = cloud_.length(farthest);
    const int most = wide_ ? 1000 : 126;
    const int exponent = reach == 0 ? 0 : std::isfinite(reach) ? std::ilogb(reach) + 2 : most;
    rounding_.scale = std::ldexp(1, std::clamp(-exponent, -most, most));
    rounding_.depth = (std::max<int64_t>(cloud_.dim, 1) + 63) / 64 * 64;
    const int64_t width = cloud_.width(), sample = std::min<int64_t>(cloud_.count, 64);
    std::vector<double> one(width), mean(width);
    for (int64_t i = 0; i < sample; ++i) {
      loops_.coordinates(cloud_, cloud_.count * i / sample, one.data());
      for (int64_t c = 0; c < width; ++c) mean[c] += one[c] / static_cast<double>(sample);
    }
    rounding_.as_float.assign(std::max(rounding_.depth, width), 0);
    rounding_.shift.assign(std::max(rounding_.depth, width), 0);
    for (int64_t c = 0; c < cloud_.dim; ++c)
      rounding_.shift[c] = -mean[c] * rounding_.scale, rounding_.as_float[c] = static_cast<float>(rounding_.shift[c]);
    if (!wide_) std::copy(rounding_.as_float.begin(), rounding_.as_float.end(), rounding_.shift.begin());
  }

  // Brings points together with centers.
  void meet(const int64_t* positions, const std::vector<Meeting>& meetings) {
    loops_.round(rounding_, centers_);
    int64_t work = 0;
    for (const Meeting& one : meetings) work += (one.end - one.begin) * one.count * cloud_.dim;
    parallel(std::ssize(meetings), work < (1 << 20) ? std::ssize(meetings) : 1, [&](int64_t begin, int64_t end) {
      loops_.meet(cloud_, rounding_, centers_, near_, positions, meetings.data(), begin, end);
    });
  }

  // Centers of another cloud, all at once.
  void take(const Cloud& others, const SelectionLoops& theirs) {
    if (others.count == 0) return;
    for (int64_t i = 0; i < others.count; ++i) theirs.coordinates(others, i, add());
    std::vector<double> values(cloud_.count, std::numeric_limits<double>::infinity());
    std::vector<int64_t> labels(cloud_.count);
    const Key farthest = measure_all(0, {values.data(), labels.data()});
    for (int64_t i = 0; i < cloud_.count; ++i)
      if (values[i] < near_.value[i]) near_.value[i] = values[i], near_.label[i] = 0;
    set_scale(farthest.value);
    if (others.count > 1) meet_all(1);
  }

  // All points with the centers [from, count), some of which they may have met. Once points have gathered about
  // centers, a center more than twice as far from the nearest as the point is cannot be nearer (Elkan 2003).
  void meet_all(int64_t from) {
    const int64_t now = centers_.count;
    while (from < now) {
      int64_t to = now;
      if (now - from >= 2 * FIRST) {
        const int64_t known = std::max(from, FIRST);
        if (gathered(from, known)) to = from < FIRST ? FIRST : std::min(now, 4 * from);
      }
      if (from >= FIRST && to < now)
        meet_by_label(from, to);
      else
        meet(nullptr, cloud_.count, from, to);
      from = to;
    }
  }

  // A list of positions, or the first `count`, with the centers [from, to).
  void meet(const int64_t* positions, int64_t count, int64_t from, int64_t to) {
    std::vector<int32_t> list(to - from);
    std::iota(list.begin(), list.end(), static_cast<int32_t>(from));
    std::vector<Meeting> meetings;
    for (int64_t begin = 0; begin < count; begin += AT_ONCE)
      meetings.push_back({list.data(), to - from, begin, std::min(count, begin + AT_ONCE)});
    meet(positions, meetings);
  }

 private:
  static constexpr int64_t AT_ONCE = 1024, FIRST = 16;

  bool may_help(double apart, double reach) const { return cloud_.length(apart) < 2 * reach * (1 + 1e-9); }

  // Would it leave out half of the meetings, once points have met all centers before `known`? Asks some of the points.
  bool gathered(int64_t from, int64_t known) {
    const int64_t count = cloud_.count, to = std::min(centers_.count, known + 64);
    std::vector<int64_t> some(std::min<int64_t>(count, 256));
    for (int64_t i = 0; i < std::ssize(some); ++i) some[i] = count * i / std::ssize(some);
    if (from < known) meet(some.data(), std::ssize(some), from, known);
    std::vector<double> apart(to - known);
    int64_t kept = 0;
    for (const int64_t position : some) {
      if (near_.label[position] < 0) {
        kept += to - known;
        continue;
      }
      loops_.between(centers_, cloud_.manhattan(), near_.label[position], known, to, apart.data());
      const double reach = cloud_.length(std::max(0.0, near_.value[position]));
      for (const double one : apart) kept += may_help(one, reach);
    }
    return kept * 2 < std::ssize(some) * (to - known);
  }

  // The group of each label, and first that of points whose nearest center is none of these.
  void meet_by_label(int64_t from, int64_t to) {
    const int64_t groups = centers_.count + 1, count = cloud_.count;
    std::vector<int64_t> ends(groups + 1), order(count);
    for (int64_t i = 0; i < count; ++i) ++ends[near_.label[i] + 2];
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (int64_t i = 0; i < count; ++i) order[next[near_.label[i] + 1]++] = i;
    std::vector<std::vector<int32_t>> lists(groups);
    parallel(groups, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> apart(to - from);
      for (int64_t group = begin; group < end; ++group) {
        double most = 0;
        for (int64_t i = ends[group]; i < ends[group + 1]; ++i) most = std::max(most, near_.value[order[i]]);
        if (most == 0) continue;
        if (group) loops_.between(centers_, cloud_.manhattan(), group - 1, from, to, apart.data());
        for (int64_t c = from; c < to; ++c)
          if (!group || may_help(apart[c - from], cloud_.length(most))) lists[group].push_back(static_cast<int32_t>(c));
      }
    });
    std::vector<Meeting> meetings;
    for (int64_t group = 0; group < groups; ++group)
      if (!lists[group].empty())
        for (int64_t begin = ends[group]; begin < ends[group + 1]; begin += AT_ONCE)
          meetings.push_back(
              {lists[group].data(), std::ssize(lists[group]), begin, std::min(ends[group + 1], begin + AT_ONCE)});
    meet(order.data(), meetings);
  }

  Cloud cloud_;
  SelectionLoops loops_;
  Nearest near_;
  Centers centers_;
  Rounding rounding_;
  bool wide_;  // whether the points are float64
};

// Every point meets every choice.
class PlainTraversal {
 public:
  explicit PlainTraversal(Covering& covering) : covering_(covering) {}
  Key next(int64_t position) {
    covering_.leave(position);
    return covering_.measure_all();
  }
  void finish() {}

 private:
  Covering& covering_;
};

// Values only fall, so while the farthest of a few is at least as far as any other point was last seen, it is the
// farthest of all: choices are made among a few of the farthest, and these among a few hundred, and so on. When the
// others could be farther, the farthest of them meet the centers that they have missed.
class PoolTraversal {
 public:
  explicit PoolTraversal(Covering& covering)
      : covering_(covering), value_(covering.near().value), count_(covering.cloud().count), met_(count_, 0) {
    for (int64_t size = std::max<int64_t>(1024, count_ / 16); size >= 32 && size < count_; size /= 8)
      sizes_.push_back(size);
  }

  // The farthest point, now that there is one center more.
  Key next(int64_t position) {
    const int64_t now = covering_.centers().count;
    covering_.leave(position);
    Key best;
    if (now == 1) {
      const Key farthest = covering_.measure_all();
      covering_.set_scale(farthest.value);
      std::fill(met_.begin(), met_.end(), 1);
      levels_.resize(sizes_.size());
      if (sizes_.empty()) return farthest;
      best = refresh(0);
    } else {
      if (sizes_.empty()) return covering_.measure_all();
      const Level& deepest = levels_.back();
      best = covering_.measure(deepest.positions);
      for (const int64_t position : deepest.positions) met_[position] = static_cast<int32_t>(now);
    }
    for (int tries = 0;;) {
      size_t most = 0;
      for (size_t i = 1; i < levels_.size(); ++i)
        if (levels_[i].rest.over(levels_[most].rest)) most = i;
      if (best.over(levels_[most].rest)) return best;
      if (most == 0 && ++tries > 2) catch_up();
      best = refresh(most);
    }
  }

  void finish() { catch_up(); }

 private:
  struct Level {
    std::vector<int64_t> positions;
    Key rest;  // the farthest, as last seen, of those of the level above that are not in this
  };

  void catch_up() {
    const int32_t now = static_cast<int32_t>(covering_.centers().count);
    const int32_t from = *std::min_element(met_.begin(), met_.end());
    if (from < now) covering_.meet_all(from);
    std::fill(met_.begin(), met_.end(), now);
  }

  // Fills level `at` and those below anew; returns the farthest of the last.
  Key refresh(size_t at) {
    for (; at < levels_.size(); ++at) {
      select(at);
      meet(levels_[at].positions);
    }
    Key best;
    for (const int64_t position : levels_.back().positions) {
      const Key key{value_[position], position};
      if (key.over(best)) best = key;
    }
    return best;
  }

  // About sizes_[at] of the farthest of the level above.
  void select(size_t at) {
    const int64_t* const from = at ? levels_[at - 1].positions.data() : nullptr;
    const int64_t count = at ? std::ssize(levels_[at - 1].positions) : count_, wanted = sizes_[at];
    const auto position = [&](int64_t i) { return from ? from[i] : i; };
    const int64_t asked = std::min<int64_t>(count, 4096);
    std::vector<double> sample(asked);
    for (int64_t i = 0; i < asked; ++i) sample[i] = value_[position(count * i / asked)];
    const int64_t rank = std::min(asked - 1, asked * wanted / count);
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<>());
    const double least = sample[rank];
    Level& level = levels_[at];
    level.positions.clear(), level.rest = Key{};
    std::mutex mutex;
    std::vector<std::pair<int64_t, std::vector<int64_t>>> parts;
    parallel(count, 1 << 16, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> found;
      Key rest;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p = position(i);
        if (value_[p] >= least)
          found.push_back(p);
        else if (const Key key{value_[p], p}; key.over(rest))
          rest = key;
      }
      const std::lock_guard lock(mutex);
      if (rest.over(level.rest)) level.rest = rest;
      parts.emplace_back(begin, std::move(found));
    });
    std::sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const auto& part : parts)
      level.positions.insert(level.positions.end(), part.second.begin(), part.second.end());
    if (std::ssize(level.positions) > 2 * wanted) {  // many are equal
      const auto over = [&](int64_t a, int64_t b) { return Key{value_[a], a}.over({value_[b], b}); };
      std::nth_element(level.positions.begin(), level.positions.begin() + wanted, level.positions.end(), over);
      const int64_t first = level.positions[wanted];
      if (const Key key{value_[first], first}; key.over(level.rest)) level.rest = key;
      level.positions.resize(wanted);
    }
  }

  // Those of a level with the centers that they have missed, in the order of how many these are.
  void meet(const std::vector<int64_t>& positions) {
    const int32_t now = static_cast<int32_t>(covering_.centers().count);
    // Ordered by how many they have met, and then by position, as memory is.
    std::vector<int64_t> next(now + 2);
    for (const int64_t position : positions) ++next[met_[position] + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    std::vector<int64_t> stale(next[now]);
    if (stale.empty()) return;
    for (const int64_t position : positions)
      if (met_[position] < now) stale[next[met_[position]]++] = position;
    std::vector<int32_t> all(now);
    std::iota(all.begin(), all.end(), 0);
    std::vector<Meeting> meetings;
    const int64_t step = 256;
    for (int64_t begin = 0; begin < std::ssize(stale); begin += step) {
      const int32_t from = met_[stale[begin]];
      meetings.push_back({all.data() + from, now - from, begin, std::min(std::ssize(stale), begin + step)});
    }
    covering_.meet(stale.data(), meetings);
    for (const int64_t position : stale) met_[position] = now;
  }

  Covering& covering_;
  double* const value_;
  const int64_t count_;
  std::vector<int32_t> met_;  // how many centers a point has met
  std::vector<int64_t> sizes_;
  std::vector<Level> levels_;
};

}  // namespace protofast
