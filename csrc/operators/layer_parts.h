// What operators check and run of a decoder layer's parts: rows, norms and the MLP.
#pragma once

#include <vector>

#include "weights.h"

namespace headwise {

// x [...,E] as rows.
inline LinearArgs check_rows(const Tensor& x, const char* operation) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.is_contiguous(), operation,
                  ": x is not a contiguous tensor on the CPU");
  LinearArgs args = {};
  args.x = x.const_data_ptr();
  args.dtype = dtype_of(x, operation, "x");
  STD_TORCH_CHECK(args.dtype != kFloat64, operation, ": x is float64");
  args.width = args.x_row = x.size(x.dim() - 1);
  args.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) args.rows *= x.size(i);
  STD_TORCH_CHECK(args.rows > 0 && args.rows <= kMostRows, operation, ": ", args.rows,
                  " rows, expected 1 to ", kMostRows);
  return args;
}

// A contiguous vector of x's dtype; null where there is none.
inline const void* check_vector(const MaybeTensor& vector, const Tensor& x, int64_t size,
                                const char* operation) {
  if (!vector.has_value()) return nullptr;
  STD_TORCH_CHECK(vector->is_cpu() && vector->scalar_type() == x.scalar_type() &&
                      vector->dim() == 1 && vector->size(0) == size && contiguous_rows(*vector),
                  operation, ": the weight or bias of a norm is not a contiguous vector of ", size,
                  " on the CPU, of x's dtype");
  return vector->const_data_ptr();
}

inline Norm check_norm(int64_t kind, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                       const Tensor& x, int64_t size, const char* operation) {
  STD_TORCH_CHECK(kind >= kNoNorm && kind <= kRmsNormWide, operation, ": no norm is of kind ",
                  kind);
  return {NormKind(kind), check_vector(weight, x, size, operation),
          check_vector(bias, x, size, operation), float(eps)};
}

inline int64_t join_bytes(const JoinArgs& args) { return 8 * padded(args.width) + 128; }

// The first half of a weight's outputs, of which the second is left.
inline LinearWeight first_half(LinearWeight* weight, Dtype dtype, const char* operation) {
  STD_TORCH_CHECK(weight->rows % 2 == 0, operation, ": ", weight->rows,
                  " outputs of a gate and what it gates, expected an even number");
  const int64_t size = element_bytes(dtype);
  weight->rows /= 2;
  const LinearWeight first = *weight;
  weight->begin = weight->rows;
  const auto past = [&](const void* data, int64_t elements) -> const void* {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * size;
  };
  if (!weight->is_packed())
    weight->data = past(weight->data, weight->rows * (weight->transposed ? 1 : weight->stride));
  weight->bias = past(weight->bias, weight->rows);
  return first;
}

// act(x G^T) * (x U^T), or act(x U^T), by D^T: weights `at`.. are the gate, up and down; gate and
// up may be one, the gate first.
struct Mlp {
  LinearArgs rows, middle;
  LinearWeight gate = {}, up = {}, down = {};
  bool gates;
  Activation activation;
  std::vector<Division> divisions;  // of up, and of down
  int64_t of_middle;                // bytes of what is between them

  Mlp(const Tensor& x, const LinearArgs& rows, const std::vector<Tensor>& weights,
      const MaybeTensors& biases, size_t at, bool gates, int64_t activation, const char* operation)
      : rows(rows), gates(gates), activation(Activation(activation)) {
    const size_t count = weights.size() - at;
    STD_TORCH_CHECK((count == 2 || count == 3) && biases.size() == weights.size(), operation, ": ",
                    weights.size(), " weights and ", biases.size(), " biases, expected ", at + 2,
                    " or ", at + 3, ", and as many");
    STD_TORCH_CHECK(activation >= kSilu && activation <= kReluSquared, operation,
                    ": no activation is ", activation);
    STD_TORCH_CHECK(gates || count == 2, operation, ": ", weights.size(),
                    " weights without a gate");
    const size_t last = weights.size() - 1;
    up = check_weight(weights[last - 1], biases[last - 1], x, rows.width, operation);
    if (count == 3)
      gate = check_weight(weights[at], biases[at], x, rows.width, operation);
    else if (gates)
      gate = first_half(&up, rows.dtype, operation);
    down = check_weight(weights[last], biases[last], x, up.rows, operation);
    STD_TORCH_CHECK(down.rows == rows.width && (!gates || gate.rows == up.rows), operation,
                    ": the outputs of the weights do not fit: ", down.rows, ", expected ",
                    rows.width, "; ", gate.rows, " of the gate and ", up.rows);
    this->rows.packed = up.is_packed();
    STD_TORCH_CHECK(!gates || gate.is_packed() == up.is_packed(), operation,
                    ": some weights are packed and others not");
    middle = {nullptr, rows.dtype, rows.rows, up.rows, up.rows, down.is_packed()};
    of_middle = aligned(taken_bytes(middle));
    // what becomes integers together is one task's
    const int64_t step = middle.packed ? kBlock : 0;
    divisions.emplace_back(&up, 1, bytes_of(up, rows) * (gates ? 2 : 1), step);
    divisions.emplace_back(&down, 1, bytes_of(down, middle));
  }

  // Bytes of a thread.
  int64_t scratch() const {
    const int64_t outputs = divisions[0].largest;
    const int64_t first =
        aligned(scratch_bytes(rows, outputs) + 8 * rows.rows * padded(outputs) + 128);
    const int64_t second = aligned(scratch_bytes(middle, divisions[1].largest));
    return first > second ? first : second;
  }

  // Into down.out, from the rows as the products read them.
  void run(const Kernels& kernels, const void* taken, char* between, char* own, int64_t scratch) {
    // the last elements of a row, past its width, are read as zeros
    if (!middle.packed) __builtin_memset(between, 0, size_t(of_middle));
    const GatedArgs gated = {rows, gates ? &gate : nullptr, &up, activation, middle, between};
    divisions[0].share(own, scratch, [&](const Division::Task& task, char* each) {
      kernels.gated(gated, task.first, task.count, taken, each);
    });
    divisions[1].share(own, scratch, [&](const Division::Task& task, char* each) {
      kernels.linear(middle, down, task.first, task.count, between, each);
    });
  }
};

}  // namespace headwise
