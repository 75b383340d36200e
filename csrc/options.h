// What attention can be asked for beside its tensors and its scale. An option is declared, read and
// checked here, and applied to scores in scores.h.
//
// No torch: operators/attend.cpp visits the options by `each` and knows for every type of field how
// the operator's schema writes it and how a call gives it. A new option of a type that is here
// needs its field, its line in `each`, and its check if it has one. An option that is 0, false or
// null is not used; a call may leave it out.
#pragma once

#include "sizes.h"

namespace headwise {

// One float for each query head, [H]; null: none.
struct PerHead {
  const float* data;
};

// Elements from one sequence, head, query and key to the next in a tensor that broadcasts to
// [B,H,S,L]; 0 where it has one for all of them.
struct ScoreStrides {
  int64_t batch, head, query, key;

  int64_t offset(int64_t b, int64_t h, int64_t s, int64_t j) const {
    return b * batch + h * head + s * query + j * key;
  }
};

// Numbers that are added to scores; null: none.
struct Bias {
  const void* data;
  Dtype dtype;
  ScoreStrides strides;
};

// Keys that are hidden from queries, by bytes of 0; null: none.
struct Mask {
  const unsigned char* data;
  ScoreStrides strides;
};

// Keys chosen for each query, [B,1|K,S,count]; -1 is none. heads of 0: every key.
struct Chosen {
  const int32_t* data;
  int64_t heads, count;
  int64_t batch, head, query;  // strides in elements; the last dim is contiguous
};

struct Options {
  bool causal;           // a query sees no key after its own position
  int64_t window;        // keys that a query sees, its own the last
  double softcap;        // scores become softcap * tanh(score / softcap)
  PerHead sinks;         // a score for each head that joins the softmax without a value (finish.h)
  PerHead alibi_slopes;  // times key minus query position, added to a score
  Bias bias;
  Mask mask;
  Chosen indices;        // positions of keys
  Chosen block_indices;  // of blocks of `block_size` keys, counted from the first key
  int64_t block_size;

  // Calls visit(name, field) for every option, in the order of the operator's arguments.
  template <class Visit>
  constexpr void each(Visit&& visit) {
    visit("causal", causal);
    visit("window", window);
    visit("softcap", softcap);
    visit("sinks", sinks);
    visit("alibi_slopes", alibi_slopes);
    visit("bias", bias);
    visit("mask", mask);
    visit("indices", indices);
    visit("block_indices", block_indices);
    visit("block_size", block_size);
  }

  // The keys that were chosen, in whichever way; null: every key.
  const Chosen* chosen() const {
    if (indices.heads > 0) return &indices;
    return block_indices.heads > 0 ? &block_indices : nullptr;
  }

  // Calls refuse(words...) for what cannot be served, and limits what is out of range. Shapes are
  // checked as a field's type asks. positions: keys and queries of a sequence at most.
  template <class Refuse>
  void check(int64_t positions, const Refuse& refuse) {
    if (window < 0 || (window > 0 && !causal))
      refuse("window is ", window, ", expected 0 or, with causal, more");
    if (window > positions) window = positions;
    const bool chosen = indices.heads > 0, blocks = block_indices.heads > 0;
    if (chosen && blocks) refuse("indices and block_indices cannot come together");
    if (blocks ? block_size < 1 : block_size != 0)
      refuse("block_size is ", block_size, ", expected 1 or more with block_indices, else 0");
    if ((chosen || blocks) && (bias.data != nullptr || alibi_slopes.data != nullptr))
      refuse("chosen keys with a bias or ALiBi are not served");
    if ((chosen || blocks) && mask.data != nullptr && mask.strides.head != 0)
      refuse("chosen keys with a mask of each head are not served");
    // far below and above what a score can be, and safe in float32
    if (softcap > 0 && softcap < 1e-30) softcap = 1e-30;
    if (softcap > 1e30) softcap = 1e30;
  }
};

}  // namespace headwise
