// Threads and their memory, for operators whose kernels run task by task.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>

namespace headwise {

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
typedef std::unique_ptr<void, Free> Memory;

inline Memory allocate(int64_t bytes) {
  Memory memory(std::aligned_alloc(64, aligned(bytes)));
  STD_TORCH_CHECK(memory != nullptr, "headwise: out of memory for ", bytes, " bytes");
  return memory;
}

// Memory that a thread keeps from call to call: fresh memory costs a page fault every 4 KiB.
inline char* keep(int64_t bytes) {
  static thread_local Memory memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory = allocate(bytes);
    size = bytes;
  }
  return static_cast<char*>(memory.get());
}

// PyTorch's number of threads.
inline int64_t most_threads() {
  const int64_t threads = torch::stable::get_num_threads();
  return threads < 1 ? 1 : threads;
}

// Runs what(task, scratch) for every task, with `bytes` of scratch for each thread, which takes
// `run` tasks at once.
template <class What>
void share(int64_t tasks, int64_t run, int64_t threads, char* scratch, int64_t bytes,
           const What& what) {
  std::atomic<int64_t> next{0};
  // parallel_for divides evenly beforehand: the counter lets a thread that is ahead take more
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t first = next.fetch_add(run); first < tasks; first = next.fetch_add(run))
      for (int64_t task = first; task < first + run && task < tasks; ++task)
        what(task, scratch + thread * bytes);
  });
}

}  // namespace headwise
