// Selection by the number at which it ends.

#include "select.h"

#include <string.h>

namespace headwise {

namespace {

constexpr float kInfinite = __builtin_inff();

// The end of as few of the largest as are `wanted` and weigh, with `weight` besides, `mass`; of all
// where they are less. By a histogram of the leading bits, three times. each(visit) visits every
// weight.
template <class Each>
End end_of_mass(const Each& each, int64_t wanted, double weight, double mass) {
  End end = {0, 0};
  uint32_t known = 0;  // the bits of `least` that are found
  int64_t above = 0;   // weights larger than what those bits allow
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const uint32_t digit = shift == 0 ? 1023 : 2047;
    int64_t count[2048] = {};
    double sum[2048] = {};
    each([&](float score) {
      const uint32_t number = ordered(score);
      if ((number & known) != (end.least & known)) return;
      const uint32_t bin = number >> shift & digit;
      ++count[bin];
      if (score < kInfinite) sum[bin] += score;
    });
    uint32_t last = 0, bin = digit;
    while (last < digit && count[last] == 0) ++last;
    const auto ends = [&] { return above + count[bin] >= wanted && weight + sum[bin] >= mass; };
    for (; bin > last && !ends(); --bin) {
      above += count[bin];
      weight += sum[bin];
    }
    end.least |= bin << shift;
    known |= digit << shift;
    end.equal = wanted - above < count[bin] ? wanted - above : count[bin];
    if (shift > 0) continue;
    if (end.equal < 1) end.equal = 1;
    // the weights of the last bin are equal
    const double each_weighs = count[bin] > 0 ? sum[bin] / double(count[bin]) : 0.0;
    while (end.equal < count[bin] && weight + double(end.equal) * each_weighs < mass) ++end.equal;
  }
  return end;
}

// The places among `count` of them that an end leaves, at most `most`.
int64_t keep(const float* scores, const int32_t* places, int64_t count, End end, int64_t most,
             int32_t* to) {
  int64_t taken = 0;
  for (int64_t i = 0; i < count && taken < most; ++i) {
    const int32_t place = places[i];
    const uint32_t number = ordered(scores[place]);
    if (number < end.least || (number == end.least && end.equal-- <= 0)) continue;
    to[taken++] = place;
  }
  return taken;
}

// Places among which the `top` largest are, ascending: all that are seen, or, where nothing is
// hidden and there are many, those that are as large as the largest of some groups.
int64_t candidates(const Kernels& kernels, const float* scores, int64_t stop, Seen seen,
                   int64_t top, int32_t* to, float* maxima) {
  const int64_t group = stop / (2 * (top > 32 ? top : 32));
  if (seen.data == nullptr && group >= 4) {
    const int64_t groups = kernels.group_maxima(scores, stop, group, maxima);
    if (groups >= top) {
      // as many groups, and so scores at least, reach the top-th of the maxima
      uint32_t* numbers = reinterpret_cast<uint32_t*>(to);  // of a fourth of the scores at most
      const uint32_t least = kernels.end_of_largest(maxima, nullptr, groups, top, numbers).least;
      const uint32_t bits = least >> 31 ? least & 0x7fffffff : ~least;
      float threshold;
      memcpy(&threshold, &bits, sizeof threshold);
      return kernels.at_least(scores, stop, threshold, to);
    }
  }
  int64_t count = 0;
  for (int64_t i = 0; i < stop; ++i)
    if (seen.at(i)) to[count++] = int32_t(i);
  return count;
}

}  // namespace

int64_t select_largest(const Kernels& kernels, const float* scores, int64_t stop, Seen seen,
                       int64_t top, int32_t* to, char* scratch) {
  int32_t* places = reinterpret_cast<int32_t*>(scratch);
  char* rest = scratch + 4 * (stop > 0 ? stop : 0);
  float* maxima = reinterpret_cast<float*>(rest);
  const int64_t count =
      stop > 0 && top > 0 ? candidates(kernels, scores, stop, seen, top, places, maxima) : 0;
  uint32_t* numbers = reinterpret_cast<uint32_t*>(rest);
  const End end =
      count > top ? kernels.end_of_largest(scores, places, count, top, numbers) : End{0, count};
  const int64_t taken = keep(scores, places, count, end, top, to);
  for (int64_t i = taken; i < top; ++i) to[i] = -1;
  return taken;
}

void select_budget(const Kernels& kernels, float* weights, int64_t stop, Seen seen,
                   const Budget& budget, int32_t* to, char* scratch) {
  double all = 0.0, kept = 0.0;
  const auto force = [&](int64_t i) {
    if (weights[i] < kInfinite) kept += weights[i];
    if (weights[i] == weights[i]) weights[i] = kInfinite;
  };
  if (budget.mass >= 0.0)
    for (int64_t i = 0; i < stop; ++i)
      if (seen.at(i) && weights[i] < kInfinite) all += weights[i];
  int64_t left = budget.first;
  for (int64_t i = 0; i < stop && left > 0; ++i)
    if (seen.at(i)) --left, force(i);
  left = budget.recent;
  for (int64_t i = stop - 1; i >= 0 && left > 0; --i)
    if (seen.at(i)) --left, force(i);
  const int64_t most = budget.most;
  const int64_t taken = select_largest(kernels, weights, stop, seen, most, to, scratch);
  if (budget.mass < 0.0 || taken <= budget.least) return;
  const auto each = [&](const auto& visit) {
    for (int64_t i = 0; i < taken; ++i) visit(weights[to[i]]);
  };
  int64_t wanted = 0;  // what is chosen in any case
  each([&](float weight) { wanted += !(weight < kInfinite); });
  if (wanted < budget.least) wanted = budget.least;
  const End end = end_of_mass(each, wanted, kept, budget.mass * all);
  for (int64_t i = keep(weights, to, taken, end, taken, to); i < most; ++i) to[i] = -1;
}

}  // namespace headwise
