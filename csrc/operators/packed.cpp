// headwise::pack and headwise::unpack: matrices in the blocks of GGUF files, as their rows lie in a
// file and as the kernels read them, and as numbers.

#include <torch/csrc/stable/library.h>

#include "weights.h"

namespace headwise {
namespace {

constexpr const char* kPack = "headwise::pack";
constexpr const char* kUnpack = "headwise::unpack";

const int64_t* check_indices(const MaybeTensor& indices, int64_t below, const char* operation) {
  if (!indices.has_value()) return nullptr;
  STD_TORCH_CHECK(indices->is_cpu() && indices->dim() == 1 && indices->is_contiguous() &&
                      indices->scalar_type() == ScalarType::Long,
                  operation, ": rows are not a contiguous vector of int64 on the CPU");
  const auto* data = static_cast<const int64_t*>(indices->const_data_ptr());
  for (int64_t i = 0; i < indices->size(0); ++i)
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < below, operation, ": row ", data[i], " of ", below);
  return data;
}

// Tasks of some rows each, on all threads.
template <class What>
void share_rows(int64_t rows, const What& what) {
  constexpr int64_t kEach = 16 * kGroup;
  share((rows + kEach - 1) / kEach, 1, most_threads(), nullptr, 0, [&](int64_t task, char*) {
    const int64_t first = task * kEach;
    what(first, rows - first < kEach ? rows - first : kEach);
  });
}

// Rows [F,blocks,bytes] of a file, or those of them that are asked for, as the kernels read them.
Tensor pack(Tensor rows, MaybeTensor order) {
  const PackedMatrix from = check_packed(rows, kPack);
  const int64_t* of = check_indices(order, from.rows, kPack);
  const int64_t count = order.has_value() ? order->size(0) : from.rows;
  Tensor out = new_tensor({count, from.blocks, from.sizes.bytes}, ScalarType::Byte);
  auto* to = static_cast<unsigned char*>(out.mutable_data_ptr());
  const PackedMatrix packed = {to, from.sizes, count, from.blocks};
  const int64_t bytes = from.sizes.bytes, row_bytes = from.blocks * bytes;
  share_rows(count, [&](int64_t first, int64_t some) {
    for (int64_t row = first; row < first + some; ++row) {
      const int64_t lane = row % kGroup, group_rows = packed.group_rows(row);
      const unsigned char* block = from.data + (of == nullptr ? row : of[row]) * row_bytes;
      unsigned char* group = to + (packed.group(row) - packed.data);
      for (int64_t i = 0; i < from.blocks; ++i, block += bytes, group += bytes * group_rows)
        for_units(from.sizes, [&](int64_t offset, int64_t unit) {
          __builtin_memcpy(group + offset * group_rows + unit * lane, block + offset, size_t(unit));
        });
    }
  });
  return out;
}

// The rows of a packed matrix, or those that are asked for, as numbers [rows,width] of the dtype of
// `like`, of which nothing else is read.
Tensor unpack(Tensor packed, Tensor like, MaybeTensor rows, int64_t level) {
  const Kernels& kernels = kernels_of(level, kUnpack);
  UnpackArgs args = {};
  args.matrix = check_packed(packed, kUnpack);
  args.dtype = dtype_of(like, kUnpack, "like");
  STD_TORCH_CHECK(args.dtype != kFloat64, kUnpack, ": like is float64");
  args.rows = check_indices(rows, args.matrix.rows, kUnpack);
  const int64_t count = rows.has_value() ? rows->size(0) : args.matrix.rows;
  Tensor out =
      new_tensor({count, args.matrix.blocks * args.matrix.sizes.columns}, like.scalar_type());
  args.out = out.mutable_data_ptr();
  share_rows(count, [&](int64_t first, int64_t some) { kernels.unpack(args, first, some); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("pack(Tensor rows, Tensor? order) -> Tensor");
  m.def("unpack(Tensor packed, Tensor like, Tensor? rows, int level) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace headwise
