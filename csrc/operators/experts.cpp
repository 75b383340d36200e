// headwise::experts: products of few rows with the experts that were chosen for them, each expert's
// weight read in place, and once for all rows that chose it.

#include <torch/csrc/stable/library.h>

#include "weights.h"

namespace headwise {
namespace {

constexpr const char* kExperts = "headwise::experts";
constexpr int64_t kMostChoices = 4096;
// Rows that are multiplied with one expert at a time.
constexpr int64_t kMostOfExpert = 16;

// Rows that chose the same expert, which lie side by side.
struct Group {
  int64_t expert, first;
  LinearArgs rows;
  void* taken;
};

// The choices in the order of their first appearance, by expert, in groups of at most
// kMostOfExpert. order: which choice each row is. A choice of `experts` itself is none, and in no
// group.
std::vector<Group> grouped(const int64_t* chosen, int64_t choices, int64_t experts,
                           std::vector<int64_t>* order) {
  std::vector<Group> groups;
  std::vector<bool> seen(size_t(choices), false);
  for (int64_t i = 0; i < choices; ++i) {
    const int64_t expert = chosen[i];
    STD_TORCH_CHECK(expert >= 0 && expert <= experts, kExperts, ": expert ", expert,
                    " was chosen of ", experts);
    if (seen[size_t(i)] || expert == experts) continue;
    for (int64_t j = i; j < choices; ++j) {
      if (chosen[j] != expert) continue;
      seen[size_t(j)] = true;
      if (j == i || groups.back().rows.rows == kMostOfExpert)
        groups.push_back({expert, int64_t(order->size()), {}, nullptr});
      ++groups.back().rows.rows;
      order->push_back(j);
    }
  }
  return groups;
}

// x [T,width] and chosen [T,k], the experts of each row, or x [T k,width] with a row for each: the
// products with weight[expert] [F,width], plus bias[expert] [F]: [T,k,F]. weight [N,F,width] and
// bias [N,F]. A choice of N is none: its row is zeros.
Tensor experts(Tensor x, Tensor chosen, Tensor weight, MaybeTensor bias, int64_t level) {
  const Kernels& kernels = kernels_of(level, kExperts);
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.is_contiguous(), kExperts,
                  ": x is not a contiguous tensor of two dims on the CPU");
  STD_TORCH_CHECK(chosen.is_cpu() && chosen.dim() == 2 && chosen.is_contiguous() &&
                      chosen.scalar_type() == ScalarType::Long,
                  kExperts, ": chosen is not a contiguous tensor of int64 and two dims on the CPU");
  const int64_t choices = chosen.numel(), width = x.size(1);
  STD_TORCH_CHECK(x.size(0) == choices || x.size(0) == chosen.size(0), kExperts, ": x has ",
                  x.size(0), " rows, expected ", chosen.size(0), " or ", choices);
  STD_TORCH_CHECK(choices <= kMostChoices, kExperts, ": ", choices, " choices, expected at most ",
                  kMostChoices);
  const Dtype dtype = dtype_of(x, kExperts, "x");
  STD_TORCH_CHECK(dtype != kFloat64, kExperts, ": x is float64");
  const LinearWeight first = check_plain(weight, bias, x, width, kExperts, 3);

  Tensor out = new_tensor({chosen.size(0), chosen.size(1), first.rows}, x.scalar_type());
  std::vector<int64_t> order;
  std::vector<Group> groups = grouped(static_cast<const int64_t*>(chosen.const_data_ptr()), choices,
                                      weight.size(0), &order);
  const int64_t rows = int64_t(order.size()), size = element_bytes(dtype);
  const int64_t of_x = size * width, of_out = size * first.rows;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  if (rows < choices) __builtin_memset(to, 0, size_t(choices * of_out));
  if (rows == 0) return out;

  std::vector<LinearWeight> weights(groups.size(), first);
  int64_t bytes = 0, of_taken = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    LinearArgs& own = groups[i].rows;
    own = {nullptr, dtype, own.rows, width, width, false};
    bytes += bytes_of(first, own);
    of_taken += aligned(taken_bytes(own));
    const auto at = [&](const void* data, int64_t stride) {
      return static_cast<const char*>(data) + groups[i].expert * size * stride;
    };
    weights[i].data = at(first.data, weight.stride(0));
    if (first.bias != nullptr) weights[i].bias = at(first.bias, bias->stride(0));
  }
  const Division division(weights.data(), weights.size(), bytes);
  LinearArgs most = groups[0].rows;
  most.rows = kMostOfExpert;
  const int64_t scratch = aligned(scratch_bytes(most, division.largest)) + take_bytes(most);
  // the rows in their groups, as they are and as the products read them, and the products
  char* memory =
      keep(aligned(rows * of_x) + of_taken + aligned(rows * of_out) + division.threads * scratch);
  char* taken = memory + aligned(rows * of_x);
  char* products = taken + of_taken;
  const int64_t shared = choices / x.size(0);  // choices of each row of x
  for (int64_t row = 0; row < rows; ++row)
    __builtin_memcpy(
        memory + row * of_x,
        static_cast<const char*>(x.const_data_ptr()) + order[size_t(row)] / shared * of_x,
        size_t(of_x));
  for (size_t i = 0; i < groups.size(); ++i) {
    Group& group = groups[i];
    group.rows.x = memory + group.first * of_x;
    group.taken = taken;
    weights[i].out = products + group.first * of_out;
    kernels.take(group.rows, 0, group.rows.rows, taken, products + aligned(rows * of_out));
    taken += aligned(taken_bytes(group.rows));
  }
  division.share(
      products + aligned(rows * of_out), scratch, [&](const Division::Task& task, char* own) {
        const Group& group = groups[task.weight];
        kernels.linear(group.rows, weights[task.weight], task.first, task.count, group.taken, own);
      });
  for (int64_t row = 0; row < rows; ++row)
    __builtin_memcpy(to + order[size_t(row)] * of_out, products + row * of_out, size_t(of_out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("experts(Tensor x, Tensor chosen, Tensor weight, Tensor? bias, int level) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("experts", TORCH_BOX(&experts)); }

}  // namespace headwise
