// Random calls of the kernels through plain pointers, for a build with sanitizers.
//
// Every buffer is allocated to its exact size, so that a byte read too far is an error of the
// AddressSanitizer; bytes past a length are NaN. Results are compared with a few lines of double.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "chosen.h"
#include "random_rows.h"
#include "select.h"

namespace {

int failures = 0;

// Runs a call on some threads; where each sequence's keys begin.
void attend(int level, const AttendArgs& a, std::vector<int64_t>* starts) {
  Plan plan = {};
  std::vector<SequencePlan> sequences(sequences_of(a));
  plan_rows(a, kernels(level)->pairs, &plan);
  std::vector<int32_t> left(sequences.size() * heads_of_sequence(a) * plan.tiles);
  plan.sequences = sequences.data(), plan.left = left.data();
  plan_tasks(a, pick({1, 2, 5}), &plan);
  std::vector<float> partial(plan.slots * slot_floats(a, plan), NAN);
  plan.partial = partial.data();
  std::vector<std::thread> threads;
  int64_t next = 0;
  for (int64_t t = 0; t < plan.threads; ++t)
    threads.emplace_back([&] {
      void* scratch = aligned_alloc(64, plan.scratch_bytes);
      for (;;) {
        const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (task >= plan.tasks) break;
        kernels(level)->attend(a, plan, task, static_cast<char*>(scratch));
      }
      free(scratch);
    });
  for (auto& thread : threads) thread.join();
  if (a.lists.keys == nullptr)
    for (int64_t b = 0; b < a.batch; ++b) (*starts)[b] = sequences[b].start;
}

void one(int level) {
  AttendArgs a = {};
  Options& options = a.options;
  a.dtype = Dtype(rng() % 3);
  a.batch = pick({1, 2, 3});
  a.kv_heads = pick({1, 2, 3});
  const int64_t group = pick({1, 2, 3, 4, 5, 8, 16, 33});
  a.heads = a.kv_heads * group;
  a.queries = pick({1, 1, 1, 2, 5, 16, 70});
  a.context = pick({0, 1, 3, 63, 64, 65, 129, 257, 600});
  a.dim = pick({1, 7, 16, 31, 33, 64, 80, 128});
  a.value_dim = pick({1, 7, 16, 31, 33, 64, 80, 128});
  if (a.heads * a.queries > 300) a.context = pick({0, 1, 65, 129});
  const bool paged = some(3), quantized = some(3);
  if (quantized) a.bits = some(5) ? 8 : 4;
  if (a.bits == 4) a.dim = pick({2, 16, 30, 64, 80, 128}), a.value_dim = pick({2, 16, 34, 64, 128});
  const bool split = some(3);  // absorbed MLA: one latent for keys and values, a rope key beside it
  if (split) a.tail_dim = a.bits == 4 ? pick({2, 8, 34, 64}) : pick({1, 8, 33, 64});
  if (split && some(7)) a.value_dim = a.dim;
  a.scale = 0.3f;
  options.softcap = some(2) ? 2.0 : 0.0;
  options.causal = some(6);
  options.window = options.causal && some(4) ? pick({1, 2, 64, 100, 10000}) : 0;
  if (options.window > a.context + a.queries) options.window = a.context + a.queries;
  // the heads inside the rows of the cache, with a gap, or apart
  const bool inside = some(5);
  const int64_t gap = pick({0, 3});
  Numbers query(a.batch * a.heads * a.queries * a.dim, a.dtype);
  a.query_row = a.dim, a.query_head = a.queries * a.dim, a.query_batch = a.heads * a.query_head;
  a.page_shift = paged ? int(pick({0, 1, 4, 6, 7})) : 0;
  const int64_t page_size = int64_t(1) << a.page_shift;
  const int64_t of_sequence = (a.context + page_size - 1) / page_size;
  const int64_t outer = paged ? a.batch * of_sequence + 2 : a.batch;
  const int64_t inner = paged ? page_size : a.context;
  std::vector<int32_t> table(paged ? a.batch * of_sequence : 0);
  for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t(i) + 1;
  if (some(7)) std::shuffle(table.begin(), table.end(), rng);
  if (paged) a.table = table.data(), a.table_row = of_sequence;
  auto strides = [&](int64_t dim, int64_t gap, int64_t* row, int64_t* head, int64_t* batch) {
    *row = (inside ? a.kv_heads : 1) * (dim + gap);
    *head = inside ? dim + gap : inner * (dim + gap);
    *batch = a.kv_heads * inner * (dim + gap);
    const int64_t all = outer * *batch;
    return all > gap ? all - gap : 0;  // the last row has no gap behind it
  };
  // where row j begins
  auto row_at = [&](int64_t b, int64_t k, int64_t j, int64_t batch, int64_t head, int64_t row) {
    if (!paged) return b * batch + k * head + j * row;
    return table[b * of_sequence + (j >> a.page_shift)] * batch + k * head + j % page_size * row;
  };
  Numbers key(strides(a.dim, gap, &a.key_row, &a.key_head, &a.key_batch), a.dtype);
  Numbers value(strides(a.value_dim, gap, &a.value_row, &a.value_head, &a.value_batch), a.dtype);
  const bool shared = split && a.value_dim == a.dim;
  if (shared) a.value_row = a.key_row, a.value_head = a.key_head, a.value_batch = a.key_batch;
  Numbers query_tail(a.batch * a.heads * a.queries * a.tail_dim, a.dtype);
  a.query_tail_row = a.tail_dim, a.query_tail_head = a.queries * a.tail_dim;
  a.query_tail_batch = a.heads * a.query_tail_head;
  Numbers key_tail(strides(a.tail_dim, gap, &a.key_tail_row, &a.key_tail_head, &a.key_tail_batch),
                   a.dtype);
  // keys chosen for each query, some of them twice
  Chosen* choice = some(3) ? &options.indices : some(2) ? &options.block_indices : nullptr;
  if (choice == &options.block_indices) options.block_size = pick({1, 3, 64, 100});
  const int64_t size = options.block_size > 0 ? options.block_size : 1;
  std::vector<int32_t> chosen;
  if (choice != nullptr) {
    choice->heads = some(5) ? a.kv_heads : 1, choice->count = pick({0, 1, 5, 70});
    choice->query = choice->count, choice->head = a.queries * choice->count;
    choice->batch = choice->heads * choice->head;
    chosen.resize(a.batch * choice->batch);
    for (auto& x : chosen) x = int32_t(rng() % ((a.context + size - 1) / size + 1)) - 1;
    choice->data = chosen.data();
  }
  std::vector<float> sinks(a.heads), slopes(a.heads);
  for (float& x : sinks) x = normal();
  for (float& x : slopes) x = fabsf(normal()) / 10;
  options.sinks.data = some(2) ? sinks.data() : nullptr;
  options.alibi_slopes.data = some(2) && !choice ? slopes.data() : nullptr;
  auto extra = [&](ScoreStrides* to) {
    const bool own[4] = {some(5), some(5) && !choice, some(5), some(8)};
    int64_t size = 1;
    to->key = own[3] ? size : 0, size *= own[3] ? a.context : 1;
    to->query = own[2] ? size : 0, size *= own[2] ? a.queries : 1;
    to->head = own[1] ? size : 0, size *= own[1] ? a.heads : 1;
    to->batch = own[0] ? size : 0, size *= own[0] ? a.batch : 1;
    return size;
  };
  Numbers bias(extra(&options.bias.strides), Dtype(rng() % 3));
  options.bias.dtype = bias.dtype;
  options.bias.data = some(3) && !choice ? bias.data() : nullptr;
  std::vector<unsigned char> mask(extra(&options.mask.strides));
  const int shown = pick({1, 6, 10});
  for (auto& m : mask) m = some(shown) && (shown > 1 || some(1));
  options.mask.data = some(4) ? mask.data() : nullptr;
  std::vector<int64_t> lengths(a.batch, a.context);
  if (some(4)) {
    for (auto& length : lengths) length = rng() % (a.context + 1);
    a.lengths64 = lengths.data();
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t k = 0; k < a.kv_heads; ++k)
        for (int64_t j = lengths[b]; j < a.context; ++j) {
          for (int64_t d = 0; d < a.dim; ++d)
            key.set(row_at(b, k, j, a.key_batch, a.key_head, a.key_row) + d, NAN);
          for (int64_t d = 0; d < a.value_dim; ++d)
            if (!shared)
              value.set(row_at(b, k, j, a.value_batch, a.value_head, a.value_row) + d, NAN);
          for (int64_t d = 0; d < a.tail_dim; ++d)
            key_tail.set(row_at(b, k, j, a.key_tail_batch, a.key_tail_head, a.key_tail_row) + d,
                         NAN);
        }
  }
  a.query = query.data(), a.key = key.data();
  a.value = shared ? a.key : value.data();
  const Numbers& used = shared ? key : value;
  if (split) a.query_tail = query_tail.data(), a.key_tail = key_tail.data();
  // integers and scales lie as the rows do, without a gap
  Integers keys, values, tails;
  const int64_t all = outer * a.kv_heads * inner;
  auto quantize = [&](Integers& to, int64_t dim, Scales* at, const void** base, int64_t* batch,
                      int64_t* head, int64_t* row) {
    to.bits = a.bits;
    to.fill(all, dim);
    strides(dim * a.bits / 8, 0, row, head, batch);
    strides(to.groups, 0, &at->row, &at->head, &at->batch);
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t k = 0; k < a.kv_heads; ++k)
        for (int64_t j = lengths[b]; j < a.context; ++j)
          for (int64_t g = 0; g < to.groups; ++g)
            to.scales[row_at(b, k, j, at->batch, at->head, at->row) + g] = NAN;
    to.widen(all, dim);
    *base = to.bytes.data();
    at->data = to.scales.data();
  };
  if (quantized) {
    quantize(keys, a.dim, &a.key_scales, &a.key, &a.key_batch, &a.key_head, &a.key_row);
    quantize(values, a.value_dim, &a.value_scales, &a.value, &a.value_batch, &a.value_head,
             &a.value_row);
    if (split)
      quantize(tails, a.tail_dim, &a.key_tail_scales, &a.key_tail, &a.key_tail_batch,
               &a.key_tail_head, &a.key_tail_row);
    if (shared) {
      a.value = a.key, a.value_scales = a.key_scales;
      a.value_row = a.key_row, a.value_head = a.key_head, a.value_batch = a.key_batch;
    }
  }
  // the number of a row of integers
  auto index = [&](int64_t b, int64_t k, int64_t j) {
    const int64_t row = inside ? a.kv_heads : 1, head = inside ? 1 : inner;
    return row_at(b, k, j, a.kv_heads * inner, head, row);
  };
  auto key_at = [&](int64_t b, int64_t k, int64_t j, int64_t d) {
    return quantized ? keys.at(index(b, k, j), d, a.dim)
                     : key.at(row_at(b, k, j, a.key_batch, a.key_head, a.key_row) + d);
  };
  auto tail_at = [&](int64_t b, int64_t k, int64_t j, int64_t d) {
    return quantized ? tails.at(index(b, k, j), d, a.tail_dim)
                     : key_tail.at(
                           row_at(b, k, j, a.key_tail_batch, a.key_tail_head, a.key_tail_row) + d);
  };
  auto value_at = [&](int64_t b, int64_t k, int64_t j, int64_t d) {
    return quantized ? (shared ? keys : values).at(index(b, k, j), d, a.value_dim)
                     : used.at(row_at(b, k, j, a.value_batch, a.value_head, a.value_row) + d);
  };
  Numbers out(a.batch * a.heads * a.queries * a.value_dim, a.dtype);
  std::vector<float> lse(a.batch * a.heads * a.queries, NAN);
  a.out = out.data(), a.lse = lse.data();

  // as operators/attend_chosen.cpp does it, in parts of some queries
  const int64_t each = choice && a.queries > 1 ? pick({1, 2, 100}) : a.queries;
  std::vector<int64_t> starts(a.batch);
  for (int64_t first = 0; first < a.queries; first += each) {
    AttendArgs run = a;
    std::vector<int32_t> keys, counts;
    if (choice) {
      Lists& lists = run.lists;
      lists.first_query = first, lists.queries = std::min(each, a.queries - first);
      lists.heads = choice->heads, lists.most = most_listed(a);
      const int64_t count = a.batch * lists.queries * lists.heads;
      keys.resize(count * lists.most + 1), counts.resize(count);
      std::vector<uint64_t> set(words_of(a));
      for (int64_t i = 0; i < count; ++i) {
        int32_t wrong = 0;
        std::vector<int32_t> list(lists.most);
        counts[i] = int32_t(list_keys(a, i / lists.heads / lists.queries, i % lists.heads,
                                      first + i / lists.heads % lists.queries, set.data(),
                                      list.data(), &wrong));
        std::copy(list.begin(), list.begin() + counts[i], keys.begin() + i * lists.most);
      }
      lists.keys = keys.data(), lists.counts = counts.data();
      run.options.causal = false, run.options.window = 0, run.options.mask = {};
      run.lengths64 = nullptr;
    }
    attend(level, run, &starts);
  }

  const double eps = a.dtype == kFloat32 ? 1e-4 : a.dtype == kBfloat16 ? 4e-2 : 5e-3;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t s = 0; s < a.queries; ++s) {
        const int64_t k = h / group, position = lengths[b] - a.queries + s;
        std::vector<double> sum(a.value_dim, 0.0);
        int64_t seen = 0;  // of a list, by whose places integers share what they stand for
        double total = options.sinks.data ? exp(double(sinks[h])) : 0.0;
        Rounding rounding(a, starts[b]);
        for (int64_t d = 0; d < a.dim; ++d)
          rounding.query(query.at(b * a.query_batch + h * a.query_head + s * a.query_row + d));
        for (int64_t j = 0; j < lengths[b]; ++j) {
          if (options.causal &&
              (j > position || (options.window && j <= position - options.window)))
            continue;
          if (options.mask.data && !mask[options.mask.strides.offset(b, h, s, j)]) continue;
          if (choice) {
            const int32_t* own = choice->data + b * choice->batch + s * choice->query +
                                 (choice->heads > 1 ? k : 0) * choice->head;
            if (std::find(own, own + choice->count, int32_t(j / size)) == own + choice->count)
              continue;
          }
          double x = 0, key_size = 0, value_size = 0;
          for (int64_t d = 0; d < a.dim; ++d) {
            x += query.at(b * a.query_batch + h * a.query_head + s * a.query_row + d) *
                 key_at(b, k, j, d);
            key_size += fabs(key_at(b, k, j, d));
          }
          for (int64_t d = 0; d < a.tail_dim; ++d)
            x += query_tail.at(b * a.query_tail_batch + h * a.query_tail_head +
                               s * a.query_tail_row + d) *
                 tail_at(b, k, j, d);
          x *= a.scale;
          if (options.softcap > 0) x = options.softcap * tanh(x / options.softcap);
          if (options.bias.data) x += bias.at(options.bias.strides.offset(b, h, s, j));
          if (options.alibi_slopes.data) x += double(slopes[h]) * double(j - position);
          const double weight = exp(x);
          total += weight;
          for (int64_t v = 0; v < a.value_dim; ++v) {
            sum[v] += weight * value_at(b, k, j, v);
            value_size = std::max(value_size, fabs(value_at(b, k, j, v)));
          }
          if (a.bits == 8)
            rounding.key(choice ? seen++ : j, key_size, weight, value_size,
                         (shared ? keys : values).scales[index(b, k, j)]);
        }
        const double more = total > 0 ? rounding.of_result(total) : 0.0;
        const int64_t row = (b * a.heads + h) * a.queries + s;
        const double expected = total > 0 ? log(total) : -INFINITY;
        bool good = expected == lse[row] || fabs(lse[row] - expected) < 1e-3 + rounding.score;
        for (int64_t v = 0; v < a.value_dim; ++v)
          good = good && fabs(out.at(row * a.value_dim + v) - (total > 0 ? sum[v] / total : 0)) <
                             more + eps * (1 + fabs(total > 0 ? sum[v] / total : 0));
        if (!good && ++failures < 5)
          printf(
              "level %d paged %d bits %d page %ld dtype %d B %ld H %ld K %ld S %ld L %ld D %ld V "
              "%ld: row %ld differs\n",
              level, int(paged), a.bits, long(page_size), int(a.dtype), long(a.batch),
              long(a.heads), long(a.kv_heads), long(a.queries), long(a.context), long(a.dim),
              long(a.value_dim), long(row));
      }
}

// The keys with the largest scores of an indexer.
void one_index(int level) {
  IndexArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.batch = pick({1, 2}), a.queries = pick({1, 3}), a.context = pick({1, 63, 64, 65, 200});
  a.heads = pick({1, 3, 16, 17, 64}), a.dim = pick({1, 7, 31, 32, 64, 128});
  const int64_t gap = pick({0, 3});
  Numbers query(a.batch * a.queries * a.heads * a.dim, a.dtype);
  Numbers key(a.batch * a.context * (a.dim + gap) - gap, a.dtype);
  std::vector<float> weight(a.batch * a.queries * a.heads), scores(a.context, NAN);
  for (float& x : weight) x = normal();
  a.query = query.data(), a.key = key.data(), a.weight = weight.data();
  a.query_head = a.dim, a.query_row = a.heads * a.dim, a.query_batch = a.queries * a.query_row;
  a.key_row = a.dim + gap, a.key_batch = a.context * a.key_row;
  a.weight_row = a.heads, a.weight_batch = a.queries * a.heads;
  const int64_t b = rng() % a.batch, s = rng() % a.queries, half = rng() % (a.context + 1);
  char* scratch = static_cast<char*>(aligned_alloc(64, (scratch_bytes(a) + 63) / 64 * 64));
  kernels(level)->index(a, b, s, 0, half, scores.data(), scratch);
  kernels(level)->index(a, b, s, half, a.context, scores.data(), scratch);
  free(scratch);
  bool good = true;
  for (int64_t j = 0; j < a.context; ++j) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < a.heads; ++i) {
      double x = 0, all = 0;
      for (int64_t d = 0; d < a.dim; ++d) {
        const double product = query.at(b * a.query_batch + s * a.query_row + i * a.dim + d) *
                               key.at(b * a.key_batch + j * a.key_row + d);
        x += product, all += fabs(product);
      }
      const double w = weight[(b * a.queries + s) * a.heads + i];
      sum += w * std::max(x, 0.0), size += fabs(w) * all;
    }
    good = good && fabs(scores[j] - sum) <= 1e-5 * size;
  }
  if (!good && ++failures < 5)
    printf("level %d dtype %d: scores of %ld heads, E %ld differ\n", level, int(a.dtype),
           long(a.heads), long(a.dim));

  // with ties, and hidden ones
  for (float& x : scores) x = some(3) ? float(int(rng() % 5) - 2) : x;
  std::vector<unsigned char> mask(2 * a.context - 1);
  for (auto& x : mask) x = some(7);
  const bool hides = some(5);
  const int64_t first = rng() % a.context, top = pick({0, 1, 5, 64, 300});
  std::vector<int32_t> to(top), order;
  const int64_t left = a.context - first;
  std::vector<char> space(select_bytes(left));
  select_largest(*kernels(level), scores.data() + first, left,
                 {hides ? mask.data() + 2 * first : nullptr, 2}, top, to.data(), space.data());
  for (int64_t j = 0; j < left; ++j)
    if (!hides || mask[2 * (first + j)]) order.push_back(int32_t(j));
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t x, int32_t y) { return scores[first + x] > scores[first + y]; });
  if (int64_t(order.size()) > top) order.resize(top);
  std::sort(order.begin(), order.end());
  order.resize(top, -1);
  if (order != to && ++failures < 5)
    printf("level %d: %ld of %ld scores are chosen wrongly\n", level, long(top), long(a.context));
}

// Linear attention of some tokens.
void one_state(int level) {
  StateArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.batch = pick({1, 2}), a.kv_heads = pick({1, 3}), a.heads = a.kv_heads * pick({1, 2});
  a.tokens = pick({1, 1, 2, 5, 40}), a.dim = pick({1, 7, 16, 33, 64}),
  a.value_dim = pick({1, 31, 32, 80});
  a.scale = 0.5f;
  // keys of some length: the delta rule magnifies those that are longer than 1
  a.norm = a.tokens > 5 || some(2) ? 1e-6f : -1.0f;
  a.transposed = some(2);
  Numbers query(a.batch * a.kv_heads * a.tokens * a.dim, a.dtype);
  Numbers key(a.batch * a.kv_heads * a.tokens * a.dim, a.dtype);
  Numbers value(a.batch * a.heads * a.tokens * a.value_dim, a.dtype);
  Numbers out(a.batch * a.heads * a.tokens * a.value_dim, a.dtype);
  a.query_row = a.key_row = a.dim, a.query_head = a.key_head = a.tokens * a.dim;
  a.query_batch = a.key_batch = a.kv_heads * a.key_head;
  a.value_row = a.value_dim, a.value_head = a.tokens * a.value_dim;
  a.value_batch = a.heads * a.value_head;
  const bool each = some(5), decays = some(7), deltas = some(6), starts = some(7);
  const int64_t heads = a.batch * a.heads, width = each ? a.dim : 1;
  std::vector<float> decay(heads * a.tokens * width), beta(heads * a.tokens);
  std::vector<float> state(heads * a.dim * a.value_dim), after(state.size(), NAN);
  for (float& x : decay) x = -fabsf(normal()) * float(pick({0, 1, 20}));
  for (float& x : beta) x = a.tokens > 5 ? fabsf(tanhf(normal())) : fabsf(normal());
  for (float& x : state) x = normal();
  std::vector<int64_t> lengths(a.batch, a.tokens);
  if (some(4)) {
    for (auto& length : lengths) length = rng() % (a.tokens + 1);
    a.lengths = lengths.data();
  }
  if (decays) a.decay = decay.data();
  a.decay_dim = each, a.decay_row = width, a.decay_head = a.tokens * width;
  a.decay_batch = a.heads * a.decay_head;
  if (deltas) a.beta = beta.data();
  a.beta_row = 1, a.beta_head = a.tokens, a.beta_batch = a.heads * a.tokens;
  if (starts) a.state = state.data();
  a.query = query.data(), a.key = key.data(), a.value = value.data();
  const std::vector<float> before = state;
  const bool in_place = starts && some(2);
  a.out = out.data(), a.after = in_place ? state.data() : after.data();
  char* scratch = static_cast<char*>(aligned_alloc(64, (scratch_bytes(a) + 63) / 64 * 64));
  for (int64_t task = 0; task < tasks_of(a); ++task) kernels(level)->state(a, task, scratch);
  free(scratch);
  bool good = true;
  const double eps = a.dtype == kFloat32 ? 1e-4 : a.dtype == kBfloat16 ? 2e-2 : 3e-3;
  const auto at = [&](int64_t head, int64_t d, int64_t v) {
    return a.transposed ? (head * a.value_dim + v) * a.dim + d
                        : (head * a.dim + d) * a.value_dim + v;
  };
  const auto factor = [&](const Numbers& rows, int64_t row) {
    if (a.norm < 0) return 1.0;
    double squares = a.norm;
    for (int64_t d = 0; d < a.dim; ++d) squares += double(rows.at(row + d)) * rows.at(row + d);
    return 1 / sqrt(squares);
  };
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t v = 0; v < a.value_dim; ++v) {
      const int64_t b = head / a.heads, k = head % a.heads / (a.heads / a.kv_heads);
      std::vector<double> column(a.dim);
      double most = 1;
      for (int64_t d = 0; d < a.dim; ++d) column[d] = starts ? before[at(head, d, v)] : 0;
      for (int64_t t = 0; t < a.tokens; ++t) {
        double sum = 0, size = 0;
        const int64_t row = ((b * a.kv_heads + k) * a.tokens + t) * a.dim;
        if (t < lengths[b]) {
          const double of_key = factor(key, row), of_query = factor(query, row);
          double found = 0;
          for (int64_t d = 0; d < a.dim; ++d) {
            if (decays)
              column[d] *= exp(double(decay[(head * a.tokens + t) * width + (each ? d : 0)]));
            found += column[d] * of_key * key.at(row + d);
          }
          double added = value.at((head * a.tokens + t) * a.value_dim + v);
          if (deltas) added = beta[head * a.tokens + t] * (added - found);
          for (int64_t d = 0; d < a.dim; ++d) {
            column[d] += of_key * key.at(row + d) * added;
            sum += 0.5 * column[d] * of_query * query.at(row + d);
            size += fabs(column[d] * of_query * query.at(row + d));
            most = std::max(most, fabs(column[d]));
          }
        }
        const int64_t to = ((b * a.tokens + t) * a.heads + head % a.heads) * a.value_dim + v;
        good = good && fabs(out.at(to) - sum) <= eps * (1 + size) + 1e-5 * most * double(a.dim);
      }
      for (int64_t d = 0; d < a.dim; ++d)
        good = good && fabs(a.after[at(head, d, v)] - column[d]) <= 1e-5 * most * double(a.dim);
    }
  if (!good && ++failures < 5)
    printf("level %d dtype %d: a state of %ld x %ld after %ld tokens differs\n", level,
           int(a.dtype), long(a.dim), long(a.value_dim), long(a.tokens));
}

// The convolution before linear attention, in both layouts.
void one_convolution(int level) {
  ConvolutionArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.batch = pick({1, 2}), a.channels = pick({1, 5, 128, 131}), a.tokens = pick({1, 2, 9, 520});
  a.width = pick({1, 3, 4, 7}), a.kept = some(3) ? 0 : a.width - 1 + rng() % 3;
  a.silu = some(2);
  const bool last = a.channels == 1 || some(2), starts = a.kept > 0 && some(2);
  const int64_t each = a.channels * a.tokens, rows = a.batch * a.channels;
  Numbers x(a.batch * each, a.dtype), weight(a.channels * a.width, a.dtype);
  Numbers bias(a.channels, a.dtype), out(a.batch * each, a.dtype);
  Numbers state(rows * a.kept, a.dtype), before(state), after(rows * a.kept, a.dtype);
  a.x_batch = each, a.x_channel = last ? 1 : a.tokens, a.x_token = last ? a.channels : 1;
  std::vector<int64_t> lengths(a.batch, a.tokens);
  if (some(4)) {
    for (auto& length : lengths) length = rng() % (a.tokens + 1);
    a.lengths = lengths.data();
  }
  const bool biased = some(2), in_place = starts && some(2);
  a.x = x.data(), a.weight = weight.data(), a.out = out.data();
  if (biased) a.bias = bias.data();
  if (starts) a.state = state.data();
  if (a.kept > 0) a.after = in_place ? state.data() : after.data();
  char* scratch = static_cast<char*>(aligned_alloc(64, (scratch_bytes(a) + 63) / 64 * 64));
  for (int64_t task = 0; task < a.batch * a.blocks(); ++task)
    kernels(level)->convolution(a, task, scratch);
  free(scratch);
  bool good = true;
  const double eps = a.dtype == kFloat32 ? 1e-5 : a.dtype == kBfloat16 ? 1e-2 : 2e-3;
  const Numbers& kept = in_place ? state : after;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t c = 0; c < a.channels; ++c) {
      const auto input = [&](int64_t t) {
        if (t >= 0) return double(x.at(b * each + c * a.x_channel + t * a.x_token));
        return starts ? double(before.at((b * a.channels + c + 1) * a.kept + t)) : 0.0;
      };
      for (int64_t t = 0; t < a.tokens; ++t) {
        double sum = biased ? bias.at(c) : 0.0, size = 1;
        for (int64_t j = 0; j < a.width; ++j) {
          const double part = input(t - a.width + 1 + j) * weight.at(c * a.width + j);
          sum += part, size += fabs(part);
        }
        if (a.silu) sum = sum / (1 + exp(-sum));
        if (t >= lengths[b]) sum = 0;
        const double found = out.at(b * each + c * a.x_channel + t * a.x_token);
        good = good && fabs(found - sum) <= eps * size;
      }
      for (int64_t n = 0; n < a.kept; ++n)
        good = good &&
               kept.at((b * a.channels + c) * a.kept + n) == float(input(lengths[b] - a.kept + n));
    }
  if (!good && ++failures < 5)
    printf("level %d dtype %d: a convolution of %ld channels, %ld tokens differs\n", level,
           int(a.dtype), long(a.channels), long(a.tokens));
}

// Products of few rows with a matrix a head.
void one_product(int level) {
  ProjectArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.up = some(5);
  a.batch = pick({1, 2}), a.heads = pick({1, 2, 3}), a.length = pick({1, 2, 5, 16});
  a.rows = pick({1, 7, 63, 64, 65, 130}), a.width = pick({1, 7, 16, 31, 64, 80, 512});
  const int64_t inner = a.up ? a.rows : a.width, outer = a.up ? a.width : a.rows;
  Numbers x(a.batch * a.heads * a.length * inner, a.dtype);
  Numbers weight(a.heads * a.rows * a.width, a.dtype);
  Numbers out(a.batch * a.heads * a.length * outer, a.dtype);
  a.x = x.data(), a.weight = weight.data(), a.out = out.data();
  a.x_row = inner, a.x_head = a.length * inner, a.x_batch = a.heads * a.x_head;
  a.weight_row = a.width, a.weight_head = a.rows * a.width;
  a.out_row = outer, a.out_head = a.length * outer, a.out_batch = a.heads * a.out_head;
  const int64_t bytes = (scratch_bytes(a) + 63) / 64 * 64;
  char* scratch = static_cast<char*>(aligned_alloc(64, bytes));
  for (int64_t head = 0; head < a.heads; ++head) kernels(level)->project(a, head, scratch);
  free(scratch);
  const double eps = a.dtype == kFloat32 ? 1e-4 : a.dtype == kBfloat16 ? 2e-2 : 3e-3;
  bool good = true;
  for (int64_t row = 0; row < a.batch * a.heads * a.length; ++row)
    for (int64_t o = 0; o < outer; ++o) {
      const int64_t head = row / a.length % a.heads;
      double sum = 0, size = 0;
      for (int64_t i = 0; i < inner; ++i) {
        const double w =
            weight.at(head * a.weight_head + (a.up ? i * a.width + o : o * a.width + i));
        sum += x.at(row * inner + i) * w;
        size += fabs(x.at(row * inner + i) * w);
      }
      good = good && fabs(out.at(row * outer + o) - sum) < eps * (0.1 + size);
    }
  if (!good && ++failures < 5)
    printf("level %d dtype %d: product %ld x %ld differs\n", level, int(a.dtype), long(a.rows),
           long(a.width));
}

// Rows as integers: each is the nearest to what it stands for, in the scale that comes with it.
void one_quantize(int level) {
  QuantizeArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.bits = some(5) ? 8 : 4;
  const int64_t batch = pick({1, 2}), gap = pick({0, 3});
  a.heads = pick({1, 3}), a.length = pick({1, 5, 64});
  a.dim = a.bits == 8 ? pick({1, 7, 33, 64, 128}) : pick({2, 16, 34, 64, 80, 128});
  a.row_row = a.dim + gap, a.row_head = a.length * a.row_row, a.row_batch = a.heads * a.row_head;
  const int64_t rows = batch * a.heads * a.length;
  Numbers x(rows * a.row_row - gap, a.dtype);
  if (some(3))
    for (int64_t d = 0; d < a.dim; ++d) x.set(d, 0);
  const int64_t bytes = a.dim * a.bits / 8;
  const int64_t groups = a.bits == 8 ? 1 : (a.dim + kInt4Group - 1) / kInt4Group;
  std::vector<unsigned char> integers(rows * bytes);
  std::vector<float> scales(rows * groups);
  a.rows = x.data(), a.integers = integers.data(), a.scales = scales.data();
  void* scratch = aligned_alloc(64, (scratch_bytes(a) + 63) / 64 * 64);
  const int64_t half = rows / 2;
  kernels(level)->quantize(a, 0, half, static_cast<char*>(scratch));
  kernels(level)->quantize(a, half, rows - half, static_cast<char*>(scratch));
  free(scratch);
  const int64_t block = a.bits == 8 ? 1 : a.dim & -a.dim;
  bool good = true;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < a.dim; ++d) {
      double value = 0;  // with 4 bits by the Hadamard matrix, whose signs count common bits
      for (int64_t i = 0; i < block; ++i)
        value += x.at(row * a.row_row + d / block * block + i) *
                 (__builtin_popcountll(i & d % block) % 2 ? -1 : 1) / sqrt(double(block));
      const double scale = scales[row * groups + (a.bits == 8 ? 0 : d / kInt4Group)];
      const unsigned char byte = integers[row * bytes + d * a.bits / 8];
      const int level_of = a.bits == 8 ? int8_t(byte) : int8_t(byte << (d % 2 ? 0 : 4)) >> 4;
      const bool outermost = a.bits == 4 && (level_of == -8 || level_of == 7);
      const double off = fabs(level_of * scale - value), step = fabs(scale);
      good = good && (off <= 0.501 * step + 1e-5 || (outermost && off <= 2.2 * step));
    }
  if (!good && ++failures < 5)
    printf("level %d dtype %d bits %d: rows of %ld are rounded wrongly\n", level, int(a.dtype),
           a.bits, long(a.dim));
}

}  // namespace

int main(int, char** argv) {
  const int calls = atoi(argv[1]);
  rng.seed(unsigned(atoi(argv[2])));
  for (int level = 0; level <= best_level(); ++level)
    for (int i = 0; i < calls; ++i) {
      one(level);
      if (i % 4 == 0) one_product(level);
      if (i % 4 == 1) one_quantize(level);
      if (i % 4 == 2) one_index(level);
      if (i % 4 == 3) one_state(level);
      if (i % 4 == 3) one_convolution(level);
    }
  printf("%d levels, %d failures\n", best_level() + 1, failures);
  return failures != 0;
}
