// headwise::reorder_: sequences in the places of others, as beams change theirs.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "tensors.h"
#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kReorder = "headwise::reorder_";
// Bytes of a sequence that a task moves, and bytes for which waking one more thread pays.
constexpr int64_t kTaskBytes = int64_t(1) << 14, kThreadBytes = int64_t(1) << 18;

struct Rows {
  char* data;
  int64_t batch, head, row, bytes;  // strides and the size of a row, in bytes

  // `count` rows of a sequence and head from `first` on: out to `side`, or back from there.
  void copy(int64_t sequence, int64_t at, int64_t first, int64_t count, char* side,
            bool back) const {
    char* own = data + sequence * batch + at * head + first * row;
    const int64_t step = row == bytes ? count : 1;
    for (int64_t i = 0; i < count; i += step, own += row, side += bytes)
      std::memcpy(back ? own : side, back ? side : own, size_t(step * bytes));
  }
};

Rows rows_of(const Tensor& tensor, const char* name, int64_t batch, int64_t heads, int64_t length) {
  check_contiguous_rows(tensor, kReorder, name, 4);
  STD_TORCH_CHECK(
      tensor.size(0) == batch && tensor.size(1) == heads && length >= 0 && length <= tensor.size(2),
      kReorder, ": ", name, " does not have ", batch, " sequences of ", heads,
      " heads and at least ", length, " rows");
  const int64_t element = int64_t(tensor.element_size());
  Rows rows = {static_cast<char*>(tensor.mutable_data_ptr()), 0, 0, 0, tensor.size(3) * element};
  take_strides(tensor, &rows.batch, &rows.head, &rows.row);
  rows.batch *= element, rows.head *= element, rows.row *= element;
  return rows;
}

// first and second [B,heads,capacity,dim]: of `length` rows sequence i becomes what index[i] was;
// index [B]. Rows of a block of tokens are read before any is written.
void reorder(Tensor first, Tensor second, Tensor index, int64_t length) {
  STD_TORCH_CHECK(first.dim() == 4, kReorder, ": first has ", first.dim(), " dims, expected 4");
  const int64_t batch = first.size(0), heads = first.size(1);
  const Rows both[] = {rows_of(first, "first", batch, heads, length),
                       rows_of(second, "second", batch, heads, length)};
  STD_TORCH_CHECK(index.is_cpu() && index.dim() == 1 && index.scalar_type() == ScalarType::Long &&
                      index.size(0) == batch && contiguous_rows(index),
                  kReorder, ": index is not a contiguous CPU tensor of ", batch, " int64");
  const int64_t* from = static_cast<const int64_t*>(index.const_data_ptr());
  std::vector<int64_t> moved;
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(from[i] >= 0 && from[i] < batch, kReorder, ": sequence ", from[i], " of ",
                    batch);
    if (from[i] != i) moved.push_back(i);
  }
  const int64_t widest = both[0].bytes > both[1].bytes ? both[0].bytes : both[1].bytes;
  if (moved.empty() || length == 0 || widest == 0) return;
  const int64_t each = kTaskBytes > widest ? kTaskBytes / widest : 1;
  const int64_t blocks = (length + each - 1) / each, tasks = 2 * heads * blocks;
  const int64_t count = int64_t(moved.size()), bytes = aligned(count * each * widest);
  int64_t threads = 1 + count * heads * length * (both[0].bytes + both[1].bytes) / kThreadBytes;
  if (threads > most_threads()) threads = most_threads();
  if (threads > tasks) threads = tasks;
  share(tasks, 1, threads, keep(threads * bytes), bytes, [&](int64_t task, char* side) {
    const Rows& rows = both[task / (heads * blocks)];
    const int64_t head = task / blocks % heads, begin = task % blocks * each;
    const int64_t some = length - begin < each ? length - begin : each;
    for (const bool back : {false, true})
      for (int64_t i = 0; i < count; ++i)
        rows.copy(back ? moved[i] : from[moved[i]], head, begin, some, side + i * some * rows.bytes,
                  back);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("reorder_(Tensor(a!) first, Tensor(b!) second, Tensor index, int length) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("reorder_", TORCH_BOX(&reorder)); }

}  // namespace headwise
