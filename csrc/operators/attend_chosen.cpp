// headwise::attend with chosen keys: lists of them first, then every list as a sequence of its own.

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../chosen.h"
#include "attend.h"
#include "tensors.h"
#include "threads.h"

namespace headwise {

namespace {

// Numbers in the lists of a part of the queries, and those that are worth another thread.
constexpr int64_t kMostListed = int64_t(1) << 22, kLeastListed = int64_t(1) << 14;

}  // namespace

void attend_chosen(const AttendArgs& args, const Kernels& kernels) {
  const Chosen& chosen = *args.options.chosen();
  AttendArgs listed = args;
  // what hides keys is applied to the lists
  listed.options.causal = false;
  listed.options.window = 0;
  listed.options.mask = {};
  listed.lengths64 = nullptr;
  listed.lengths32 = nullptr;
  Lists& lists = listed.lists;
  lists.heads = chosen.heads;
  lists.most = most_listed(args);
  const int64_t room = lists.most > 0 ? lists.most : 1;
  int64_t each = kMostListed / (args.batch * lists.heads * room);
  if (each < 1) each = 1;
  if (each > args.queries) each = args.queries;
  const int64_t threads = most_threads(), set_bytes = aligned(8 * words_of(args));
  const int64_t most = args.batch * each * lists.heads;
  const int64_t key_bytes = aligned(int64_t(sizeof(int32_t)) * most * room);
  const int64_t count_bytes = aligned(int64_t(sizeof(int32_t)) * most);
  const Memory memory = allocate(key_bytes + count_bytes + threads * set_bytes);
  int32_t* keys = static_cast<int32_t*>(memory.get());
  int32_t* counts = reinterpret_cast<int32_t*>(static_cast<char*>(memory.get()) + key_bytes);
  char* sets = reinterpret_cast<char*>(counts) + count_bytes;
  std::memset(sets, 0, threads * set_bytes);
  for (int64_t first = 0; first < args.queries; first += each) {
    lists.first_query = first;
    lists.queries = args.queries - first < each ? args.queries - first : each;
    const int64_t count = args.batch * lists.queries * lists.heads;
    const int64_t wanted = 1 + count * room / kLeastListed;
    std::atomic<int64_t> wrong{-1};
    share(count, 1, wanted < threads ? wanted : threads, sets, set_bytes,
          [&](int64_t list, char* set) {
            const int64_t head = list % lists.heads, query = list / lists.heads;
            int32_t value = 0;
            const int64_t found =
                list_keys(args, query / lists.queries, head, first + query % lists.queries,
                          reinterpret_cast<uint64_t*>(set), keys + list * lists.most, &value);
            if (found < 0) wrong.store((int64_t(value) << 1) | (int64_t(1) << 62));
            counts[list] = int32_t(found < 0 ? 0 : found);
          });
    STD_TORCH_CHECK(wrong.load() == -1, kAttend, ": a chosen key, ",
                    int32_t((wrong.load() & ~(int64_t(1) << 62)) >> 1), ", does not exist");
    lists.keys = keys;
    lists.counts = counts;
    run_attend(listed, kernels);
  }
}

}  // namespace headwise
