// Random choices of keys through plain pointers, for a build with sanitizers: see fuzz_attend.cpp.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <vector>

#include "random_rows.h"
#include "select.h"

namespace {

int failures = 0;

// The weights of every query and key that the kernels give, beside those of a few lines of double.
void one_sketch(int level) {
  SketchArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.batch = pick({1, 2}), a.kv_heads = pick({1, 3});
  const int64_t group = pick({1, 2, 3, 6, 7, 16});
  a.heads = a.kv_heads * group;
  a.queries = pick({1, 1, 2, 16});
  a.context = pick({1, 15, 16, 17, 64, 130, 1024, 1500});
  a.dim = pick({2, 6, 8, 20, 32, 64, 80, 128, 130, 576});
  if (a.heads * a.queries > 40) a.context = pick({1, 40, 130}), a.dim = pick({2, 20, 64});
  a.scale = 0.3f;
  a.softcap = some(2) ? 2.0f : 0.0f;
  a.causal = some(6);
  const int64_t gap = pick({0, 0, 5}), bytes = a.dim / 2, groups = a.groups();
  const bool paged = some(4);
  a.page_shift = paged ? int(pick({0, 2, 4, 6})) : 0;
  const int64_t size = int64_t(1) << a.page_shift;
  const int64_t of_sequence = (a.context + size - 1) / size;
  const int64_t outer = paged ? a.batch * of_sequence : a.batch, inner = paged ? size : a.context;
  std::vector<int32_t> table(a.batch * of_sequence);
  for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t(i);
  std::shuffle(table.begin(), table.end(), rng);
  if (paged) a.table = table.data(), a.table_row = of_sequence;
  Numbers query(a.batch * a.heads * a.queries * a.dim, a.dtype);
  a.query = query.data();
  a.query_row = a.dim, a.query_head = a.queries * a.dim, a.query_batch = a.heads * a.query_head;
  a.key_row = bytes + gap, a.key_head = inner * a.key_row, a.key_batch = a.kv_heads * a.key_head;
  a.scales.row = groups + gap, a.scales.head = inner * a.scales.row;
  a.scales.batch = a.kv_heads * a.scales.head;
  std::vector<unsigned char> keys(outer * a.key_batch - gap);
  for (auto& x : keys) x = (unsigned char)(rng());
  std::vector<float> scales(outer * a.scales.batch - gap), sinks(a.heads);
  for (float& x : scales) x = 0.2f * normal();
  for (float& x : sinks) x = normal();
  a.keys = keys.data(), a.scales.data = scales.data();
  if (some(3)) a.sinks = sinks.data();
  std::vector<int64_t> lengths(a.batch);
  for (auto& x : lengths) x = int64_t(rng() % (a.context + 1));
  if (some(4)) a.lengths = lengths.data();
  std::vector<unsigned char> mask(a.batch * a.queries * a.context);
  for (auto& x : mask) x = some(7);
  if (some(3)) a.mask = {mask.data(), {a.queries * a.context, 0, a.context, 1}};

  const int64_t rows = a.queries * group, parts = a.batch * a.kv_heads;
  char* scratch = static_cast<char*>(aligned_alloc(64, (scratch_bytes(a) + 63) / 64 * 64));
  const int64_t taken_each = (taken_bytes(a, a.queries) + 63) / 64 * 64;
  char* taken = static_cast<char*>(aligned_alloc(64, taken_each));
  std::vector<float> weights(rows * a.pitch()), maxima(rows * a.ranges()), sums(maxima.size());
  std::vector<float> summed(a.pitch()), factor(group * a.ranges()), mass(group);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t b = part / a.kv_heads, k = part % a.kv_heads, held = a.held(b);
    std::fill(maxima.begin(), maxima.end(), -INFINITY);
    std::fill(sums.begin(), sums.end(), 0.0f);
    std::fill(weights.begin(), weights.end(), 0.0f);
    const SketchPart all = {b, k, 0, a.queries, taken, weights.data(), maxima.data(), sums.data()};
    kernels(level)->sketch_queries(a, all, scratch);
    for (int64_t first = 0; first < held; first += kSketchRange)
      kernels(level)->sketch_scores(a, all, first, std::min(first + kSketchRange, held), scratch);
    const int64_t block = a.dim & -a.dim;
    bool good = true;
    for (int64_t s = 0; s < a.queries; ++s) {
      const int64_t stop = a.stop(b, s), row = s * group;
      const SketchPart one = {b,
                              k,
                              s,
                              1,
                              taken,
                              weights.data() + row * a.pitch(),
                              maxima.data() + row * a.ranges(),
                              sums.data() + row * a.ranges()};
      kernels(level)->sketch_weights(a, one, stop, {summed.data(), factor.data(), mass.data()});
      std::vector<double> expected(stop), slack(stop);
      for (int64_t g = 0; g < group; ++g) {
        std::vector<double> q(a.dim), score(stop), off(stop);
        double top = 0, most = a.sinks == nullptr ? -INFINITY : a.sinks[k * group + g];
        for (int64_t d = 0; d < a.dim; ++d) {
          for (int64_t i = 0; i < block; ++i)
            q[d] += query.at(b * a.query_batch + (k * group + g) * a.query_head + s * a.query_row +
                             d / block * block + i) *
                    (__builtin_popcountll(i & d % block) % 2 ? -1 : 1) / sqrt(double(block));
          top = std::max(top, fabs(q[d]));
        }
        const auto seen = [&](int64_t j) {
          return a.mask.data == nullptr || a.mask.data[a.mask.strides.offset(b, 0, s, j)] != 0;
        };
        for (int64_t j = 0; j < stop; ++j) {
          const int64_t page = paged ? table[b * of_sequence + j / size] : b;
          const int64_t within = paged ? j % size : j;
          const unsigned char* key =
              keys.data() + page * a.key_batch + k * a.key_head + within * a.key_row;
          const float* scale =
              scales.data() + page * a.scales.batch + k * a.scales.head + within * a.scales.row;
          for (int64_t d = 0; d < a.dim; ++d) {
            const int integer = int8_t(key[d / 2] << (d % 2 ? 0 : 4)) >> 4;
            const double x = integer * double(scale[d / kInt4Group]);
            score[j] += q[d] * x * a.scale, off[j] += fabs(x) * top / 127 * 0.51 * a.scale;
          }
          if (a.softcap > 0) score[j] = a.softcap * tanh(score[j] / a.softcap);
          if (!seen(j)) score[j] = -INFINITY;
          most = std::max(most, score[j]);
        }
        double sum = a.sinks == nullptr ? 0 : exp(a.sinks[k * group + g] - most), wide = 0;
        for (int64_t j = 0; j < stop; ++j)
          if (seen(j)) sum += exp(score[j] - most), wide = std::max(wide, off[j]);
        double all = 0;
        for (int64_t j = 0; j < stop; ++j) {
          const double weight = seen(j) ? exp(score[j] - most) / sum : 0;
          const double own = weight * (exp(2 * wide) - 1 + 1e-4);
          const float given =
              weights[(row + g) * a.pitch() + j] * factor[g * a.ranges() + j / kSketchRange];
          good = good && fabs(given - weight) <= own + 1e-12;
          expected[j] += weight, slack[j] += own, all += weight;
        }
        good = good && fabs(mass[g] - all) <= all * (exp(2 * wide) - 1 + 1e-4) + 1e-12;
      }
      for (int64_t j = 0; j < stop; ++j)
        good = good && fabs(summed[j] - expected[j]) <= slack[j] + 1e-12;
    }
    if (!good && ++failures < 5)
      printf("level %d dtype %d: weights of %ld keys, D %ld differ\n", level, int(a.dtype),
             long(a.context), long(a.dim));
  }
  free(scratch);
  free(taken);
}

// What was not chosen, by the mean of the values that each query sees.
void one_rest(int level) {
  RestArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.batch = pick({1, 2}), a.kv_heads = pick({1, 3}), a.heads = a.kv_heads * pick({1, 2, 7});
  a.queries = pick({1, 1, 3}), a.context = a.queries + pick({0, 1, 70, 300});
  a.dim = pick({1, 7, 16, 64, 80});
  a.summed = rng() % (a.context - a.queries + 1);
  const bool paged = some(4);
  const int64_t gap = pick({0, 3}), size = paged ? 16 : a.context;
  a.page_shift = paged ? 4 : 0;
  const int64_t pages = (a.context + size - 1) / size;
  std::vector<int32_t> table(a.batch * pages);
  for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t(i);
  std::shuffle(table.begin(), table.end(), rng);
  if (paged) a.table = table.data(), a.table_row = pages;
  a.value_row = a.dim + gap, a.value_head = size * a.value_row;
  a.value_batch = a.kv_heads * a.value_head;
  Numbers values((paged ? a.batch * pages : a.batch) * a.value_batch - gap, a.dtype);
  Numbers out(a.batch * a.heads * a.queries * a.dim, a.dtype), before = out;
  std::vector<float> rest(a.batch * a.heads * a.queries), sums(a.batch * a.kv_heads * a.dim);
  for (float& x : rest) x = float(rng() % 100) / 100;
  for (float& x : sums) x = normal();
  a.values = values.data(), a.out = out.data(), a.rest = rest.data(), a.sums = sums.data();
  char* scratch = static_cast<char*>(aligned_alloc(64, (scratch_bytes(a) + 63) / 64 * 64));
  for (int64_t i = 0; i < a.batch * a.kv_heads; ++i)
    kernels(level)->rest(a, i / a.kv_heads, i % a.kv_heads, scratch);
  free(scratch);
  bool good = true;
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t i = 0; i < a.batch * a.heads * a.queries; ++i) {
    const int64_t b = i / a.queries / a.heads, h = i / a.queries % a.heads, s = i % a.queries;
    const int64_t stop = a.context - a.queries + s + 1, k = h / group;
    for (int64_t d = 0; d < a.dim; ++d) {
      double sum = sums[(b * a.kv_heads + k) * a.dim + d], all = fabs(sum);
      for (int64_t j = a.summed; j < stop; ++j) {
        const int64_t at = paged ? table[b * pages + j / size] : b;
        const double x =
            values.at(at * a.value_batch + k * a.value_head + j % size * a.value_row + d);
        sum += x, all += fabs(x);
      }
      const double wanted = (1 - rest[i]) * before.at(i * a.dim + d) + rest[i] * sum / stop;
      const double size_of = fabs(before.at(i * a.dim + d)) + all / stop;
      const double unit = a.dtype == kFloat32 ? 1e-6 : a.dtype == kBfloat16 ? 4e-3 : 5e-4;
      good = good && fabs(out.at(i * a.dim + d) - wanted) <= 2 * unit * size_of + 1e-7;
    }
  }
  if (!good && ++failures < 5)
    printf("level %d dtype %d: the rest of %ld keys, D %ld differs\n", level, int(a.dtype),
           long(a.context), long(a.dim));
}

// The keys above the thresholds of some rows, cut by hand, beside scores of double.
void one_search(int level) {
  TopArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.batch = pick({1, 2}), a.kv_heads = pick({1, 3}), a.heads = a.kv_heads * pick({1, 2, 7});
  a.queries = pick({1, 1, 3, 8, 19});
  a.context = pick({1, 15, 63, 64, 65, 130, 700});
  a.dim = pick({1, 7, 16, 33, 64, 80, 576});
  if (a.rows() * a.dim > 2000) a.context = pick({1, 65, 130});
  const int64_t gap = pick({0, 0, 3});
  a.query_row = a.dim + gap, a.query_head = a.queries * a.query_row;
  a.query_batch = a.heads * a.query_head;
  a.key_row = a.dim + gap, a.key_head = a.context * a.key_row;
  a.key_batch = a.kv_heads * a.key_head;
  Numbers query(a.batch * a.query_batch - gap, a.dtype), key(a.batch * a.key_batch - gap, a.dtype);
  a.query = query.data(), a.key = key.data();
  std::vector<unsigned char> mask(a.batch * a.context);
  for (auto& x : mask) x = some(7);
  if (some(4)) a.mask = {mask.data(), {a.context, 0, 0, 1}};
  const int64_t tile = std::min(a.rows(), kTopRows), top = pick({1, 5, 64});
  const int64_t room = top + kBlock + pick({0, 100});
  char* scratch = static_cast<char*>(aligned_alloc(64, (scratch_bytes(a, tile) + 63) / 64 * 64));
  std::vector<float> scores(tile * room), thresholds(tile + 16, INFINITY);
  std::vector<int32_t> places(tile * room), counts(tile), kept(top);
  std::vector<char> space(select_bytes(room));
  bool good = true;
  for (int64_t head = 0; head < a.batch * a.kv_heads; ++head)
    for (int64_t row = 0; row < a.rows(); row += tile) {
      const TopPart part = {head / a.kv_heads,
                            head % a.kv_heads,
                            row,
                            std::min(tile, a.rows() - row),
                            room,
                            scores.data(),
                            places.data(),
                            counts.data(),
                            thresholds.data()};
      std::fill(counts.begin(), counts.end(), 0);
      std::fill(thresholds.begin(), thresholds.end(), INFINITY);
      std::fill(thresholds.begin(), thresholds.begin() + part.rows, -INFINITY);
      for (int64_t at = 0; at < a.context;) {
        at = kernels(level)->top(a, part, at, a.context, scratch);
        for (int64_t i = 0; i < part.rows; ++i) {
          if (counts[i] <= top) continue;
          float* own = &scores[i * room];
          int32_t* list = &places[i * room];
          select_largest(*kernels(level), own, counts[i], {nullptr, 1}, top, kept.data(),
                         space.data());
          thresholds[i] = INFINITY;
          for (int64_t j = 0; j < top; ++j) {
            own[j] = own[kept[j]], list[j] = list[kept[j]];
            thresholds[i] = std::min(thresholds[i], own[j]);
          }
          counts[i] = int32_t(top);
        }
      }
      for (int64_t i = 0; i < part.rows; ++i) {
        std::vector<double> expected;
        double slack = 0;
        for (int64_t j = 0; j < a.context; ++j) {
          double dot = 0, size = 0;
          for (int64_t d = 0; d < a.dim; ++d) {
            const double x =
                query.at(a.query_of(part, i) + d) * key.at(a.keys_of(part) + j * a.key_row + d);
            dot += x, size += fabs(x);
          }
          if (!a.seen(part, j)) continue;
          expected.push_back(dot), slack = std::max(slack, 1e-5 * size);
          for (int64_t n = 0; n < counts[i]; ++n)
            if (places[i * room + n] == j) good = good && fabs(scores[i * room + n] - dot) <= slack;
        }
        std::sort(expected.rbegin(), expected.rend());
        const int64_t most = std::min(top, int64_t(expected.size()));
        good = good && counts[i] == most;
        for (int64_t n = 0; n < counts[i] && good; ++n) {
          good = a.seen(part, places[i * room + n]);
          good = good && (n == 0 || places[i * room + n] > places[i * room + n - 1]);
          good = good && scores[i * room + n] >= expected[most - 1] - slack;
        }
      }
    }
  free(scratch);
  if (!good && ++failures < 5)
    printf("level %d dtype %d: the largest of %ld keys, D %ld differ\n", level, int(a.dtype),
           long(a.context), long(a.dim));
}

// What a budget takes of weights with ties, hidden ones among them.
void one_budget(int level) {
  const int64_t count = pick({1, 7, 64, 300, 3000});
  std::vector<float> weights(count);
  const bool ties = some(3);
  for (float& x : weights) x = ties ? float(rng() % 5) : fabsf(normal());
  std::vector<unsigned char> mask(2 * count - 1);
  for (auto& x : mask) x = some(8);
  const Seen seen = {some(3) ? mask.data() : nullptr, 2};
  Budget budget = {};
  budget.most = pick({1, 5, 32, 200, 4000});
  budget.least = rng() % (budget.most + 1);
  budget.first = rng() % (budget.most / 2 + 1), budget.recent = budget.most / 4;
  budget.mass = some(5) ? -1.0 : pick({1, 50, 90, 100}) / 100.0;
  std::vector<int32_t> visible, to(budget.most, -7);
  for (int64_t i = 0; i < count; ++i)
    if (seen.at(i)) visible.push_back(int32_t(i));
  std::vector<bool> certain(count);
  const int64_t all = int64_t(visible.size());
  for (int64_t i = 0; i < all; ++i)
    certain[visible[i]] = i < budget.first || i >= all - budget.recent;
  std::vector<int32_t> order = visible;
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
    if (certain[x] != certain[y]) return bool(certain[x]);
    return !certain[x] && weights[x] > weights[y];
  });
  double total = 0, sum = 0;
  for (int32_t i : visible) total += weights[i];
  int64_t taken = 0;
  for (; taken < all && taken < budget.most; ++taken) {
    const bool enough = budget.mass >= 0 && taken >= budget.least && !certain[order[taken]] &&
                        sum >= budget.mass * total * (1 - 1e-9);
    if (enough) break;
    sum += weights[order[taken]];
  }
  order.resize(taken);
  std::sort(order.begin(), order.end());
  order.resize(budget.most, -1);
  std::vector<char> space(select_bytes(count));
  select_budget(*kernels(level), weights.data(), count, seen, budget, to.data(), space.data());
  if (to != order && ++failures < 5)
    printf("level %d: of %ld weights the wrong ones are taken\n", level, long(count));
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, failures, [](int level, int i) {
    if (i % 4 == 0) one_sketch(level);
    if (i % 4 == 1) one_search(level);
    if (i % 4 == 2) one_rest(level);
    one_budget(level);
  });
}
