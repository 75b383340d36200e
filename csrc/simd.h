// Vectors of floats in the width of the instruction set that this file is compiled for.
//
// GCC's and Clang's vector extensions carry it; intrinsics stand only where the compilers do badly.
// Everything is inside the namespace HEADWISE_ISA, so that no function compiled for one instruction
// set can be taken by the linker for another; for the same reason nothing of the standard library's
// templates may be used here.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define HEADWISE_INLINE inline __attribute__((always_inline))
#define HEADWISE_LAMBDA __attribute__((always_inline))

// Products of pairs of bf16.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HEADWISE_PAIRS
#endif

namespace headwise {
namespace HEADWISE_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// Vectors that the registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef float v4 __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
HEADWISE_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

constexpr float kInfinity = __builtin_inff();

HEADWISE_INLINE vf splat(float x) { return x - vf{}; }
HEADWISE_INLINE vi splat_int(int32_t x) { return x - vi{}; }

HEADWISE_INLINE vf iota() {
  vf lanes;
  for (int i = 0; i < W; ++i) lanes[i] = float(i);
  return lanes;
}

HEADWISE_INLINE vf load(const float* from) {
  vf x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

HEADWISE_INLINE void store(float* to, vf x) { __builtin_memcpy(to, &x, sizeof x); }
#if defined(__AVX512F__) || defined(__AVX2__)
HEADWISE_INLINE void store(float* to, v4 x) { __builtin_memcpy(to, &x, sizeof x); }
#endif

HEADWISE_INLINE vf load(const bf16* from) {
#if defined(__AVX512F__)
  __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
#elif defined(__AVX2__)
  __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
#else
  vh x;
  __builtin_memcpy(&x, from, sizeof x);
  return bits_of<vf>(__builtin_convertvector(x, vu) << 16);
#endif
}

HEADWISE_INLINE vf load(const f16* from) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  float16x4_t x;
  __builtin_memcpy(&x, from, sizeof x);
  return (vf)vcvt_f32_f16(x);
#else
  vh x;
  __builtin_memcpy(&x, from, sizeof x);
  const vu wide = __builtin_convertvector(x, vu), size = wide & 0x7fffu;
  // the exponent's bias differs by 112
  const vu normal = (size << 13) + 0x38000000u;
  // a subnormal number is an integer of 2^-24: no subnormal float, which the processor may be set
  // to read as 0, stands on the way
  const vu small = bits_of<vu>(__builtin_convertvector(bits_of<vi>(size), vf) * 0x1p-24f);
  const vu special = bits_of<vu>(size >= 0x7c00u) & 0x7f800000u;
  const vu magnitude = bits_of<vi>(size < 0x400u) ? small : normal;
  return bits_of<vf>(magnitude | special | (wide & 0x8000u) << 16);
#endif
}

// W integers of 8 bits, or of 4: two a byte, the low half first.
template <int BITS>
HEADWISE_INLINE vf load_integers(const char* from) {
  if constexpr (BITS == 8) {
#if defined(__AVX512F__)
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
#elif defined(__AVX2__)
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
#else
    vb x;
    __builtin_memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, vf);
#endif
  } else {
    // every lane gets the 32 bits that hold its own four, which move to the top and down again
#if defined(__AVX512F__)
    int64_t both;
    __builtin_memcpy(&both, from, sizeof both);
    const __m512i bits = _mm512_inserti64x4(_mm512_set1_epi32(int32_t(both)),
                                            _mm256_set1_epi32(int32_t(both >> 32)), 1);
    const __m512i turns =
        _mm512_set_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return (vf)_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(bits, turns), 28));
#elif defined(__AVX2__)
    int32_t all;
    __builtin_memcpy(&all, from, sizeof all);
    const __m256i turns = _mm256_set_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i high = _mm256_sllv_epi32(_mm256_set1_epi32(all), turns);
    return (vf)_mm256_cvtepi32_ps(_mm256_srai_epi32(high, 28));
#else
    vf x;
    for (int i = 0; i < W; ++i) {
      const unsigned byte = (unsigned char)(from[i / 2]);
      x[i] = float(int8_t(byte << (i % 2 ? 0 : 4)) >> 4);
    }
    return x;
#endif
  }
}

// The first `count` elements, zeros behind them; reads no further.
template <class T>
HEADWISE_INLINE vf load_part(const T* from, int count) {
  T some[W] = {};
  __builtin_memcpy(some, from, sizeof(T) * count);
  return load(some);
}

HEADWISE_INLINE float to_float(float x) { return x; }
HEADWISE_INLINE float to_float(double x) { return float(x); }
HEADWISE_INLINE float to_float(bf16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }
HEADWISE_INLINE float to_float(f16 x) {
  const uint32_t size = x.bits & 0x7fffu;
  const uint32_t normal = (size << 13) + 0x38000000u;
  const uint32_t small = bits_of<uint32_t>(float(int32_t(size)) * 0x1p-24f);
  const uint32_t special = size >= 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t magnitude = size < 0x400u ? small : normal;
  return bits_of<float>(magnitude | special | uint32_t(x.bits & 0x8000u) << 16);
}

// Rounding to nearest, ties to even, as PyTorch does.
HEADWISE_INLINE void from_float(float x, float* to) { *to = x; }
HEADWISE_INLINE void from_float(float x, bf16* to) {
  uint32_t u = bits_of<uint32_t>(x);
  uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
  to->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
HEADWISE_INLINE void from_float(float x, f16* to) {
  uint32_t u = bits_of<uint32_t>(x), sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  uint32_t normal = (u - 0x38000000u + 0xfffu + (u >> 13 & 1)) >> 13;
  // below 2^-14: adding 0.5 leaves the subnormal number in the low bits, rounded by the adder
  uint32_t small = bits_of<uint32_t>(bits_of<float>(u) + 0.5f) - 0x3f000000u;
  uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t magnitude = u < 0x38800000u ? small : u >= 0x477ff000u ? special : normal;
  to->bits = uint16_t(sign | magnitude);
}

// x rounded to floats, not drawn together with a sum that it enters. Where the largest of some
// products is subtracted from them, the difference is 0 or less then, whatever their size.
template <class T>
HEADWISE_INLINE T rounded(T x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// x as T holds it.
template <class T>
HEADWISE_INLINE float as_held(float x) {
  T narrow;
  from_float(x, &narrow);
  return to_float(narrow);
}
template <class T>
struct Held {
  static HEADWISE_INLINE vf vector(vf x) {
    T narrow[W];
    for (int i = 0; i < W; ++i) from_float(x[i], narrow + i);
    return load(narrow);
  }
};
template <>
struct Held<float> {
  static HEADWISE_INLINE vf vector(vf x) { return x; }
};
template <>
struct Held<bf16> {
  static HEADWISE_INLINE vf vector(vf x) {
    const vu u = bits_of<vu>(x);
    const vu up = (u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u;
    return (vi)(x != x) ? x : bits_of<vf>(up);
  }
};
// A vector as T holds it, to memory.
HEADWISE_INLINE void store_as(float* to, vf x) { store(to, x); }
HEADWISE_INLINE void store_as(bf16* to, vf x) {
  const vu u = bits_of<vu>(x);
  const vu up = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const vh narrow = __builtin_convertvector((vi)(x != x) ? (vu{} + 0x7fc0u) : up, vh);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}
HEADWISE_INLINE void store_as(f16* to, vf x) {
  for (int i = 0; i < W; ++i) from_float(x[i], to + i);
}

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
template <>
struct Held<f16> {
  static HEADWISE_INLINE vf vector(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
  }
};
#endif
template <class T>
HEADWISE_INLINE vf as_held(vf x) {
  return Held<T>::vector(x);
}

HEADWISE_INLINE vf select(vi condition, vf yes, vf no) { return condition ? yes : no; }

// a where it is larger, else b: also where one is NaN.
HEADWISE_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (vi)(a > b) ? a : b;
#endif
}

// e^x for x <= 88, 0 below -87.3 and for -inf. Cephes' expf: relative error below 2e-7.
HEADWISE_INLINE vf exp(vf x) {
  const vi alive = (vi)(x >= -87.3f);
  const vf clamped = select(alive, x, vf{});
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = clamped * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi exponent = bits_of<vi>(shifted) << 23;  // the integer is in the low bits
  const vf result = bits_of<vf>(bits_of<vi>(p) + exponent);
  // a NaN is not alive and must not become 0
  return select((vi)(x != x), x, select(alive, result, vf{}));
}

// The same to a relative error of 3e-6, for weights that are rounded to bf16: 2^n times a
// polynomial of the rest.
HEADWISE_INLINE vf exp_near(vf x) {
#if defined(__AVX512F__)
  const __m512 y = _mm512_mul_ps((__m512)x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf r = (vf)_mm512_sub_ps(y, n);
  vf p = splat(9.57009e-3f);
  p = p * r + 5.591786e-2f;
  p = p * r + 2.4024745e-1f;
  p = p * r + 6.9312181e-1f;
  p = p * r + 9.9999926e-1f;
  const __mmask16 alive = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(alive, (__m512)p, n);
#else
  return exp(x);
#endif
}

// A bit for each lane where the condition holds.
HEADWISE_INLINE uint32_t lanes(vi condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)condition));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint32_t(condition[i] & 1) << i;
  return bits;
#endif
}

HEADWISE_INLINE bool all(vi condition) { return lanes(condition) == (uint32_t(1) << W) - 1; }

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
HEADWISE_INLINE vf tanh(vf x) {
  const vf size = select((vi)(x < 0.0f), -x, x);
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf near = p * z * x + x;
  const vf bounded = select((vi)(size < 10.0f), size, splat(10.0f));
  const vf far = 1.0f - 2.0f / (exp(bounded + bounded) + 1.0f);
  const vf result = select((vi)(size < 0.625f), near, select((vi)(x < 0.0f), -far, far));
  return select((vi)(x != x), x, result);
}

// The sums of the 128-bit quarters, so that lane i holds the sum of the lanes i, i + 4, ...
HEADWISE_INLINE v4 fold(vf x) {
#if defined(__AVX512F__)
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#elif defined(__AVX2__)
  return (v4)_mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  return x;
#endif
}

HEADWISE_INLINE float sum(vf x) {
  const v4 y = fold(x);
  return (y[0] + y[1]) + (y[2] + y[3]);
}

HEADWISE_INLINE float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
  __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
#else
  float top = x[0];
  for (int i = 1; i < W; ++i) top = x[i] > top ? x[i] : top;
  return top;
#endif
}

// Lane i of the result is the sum of all lanes of the i-th vector: a tree of shuffles and adds.
HEADWISE_INLINE v4 sums(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
  __m512 x = (__m512)a, y = (__m512)b, z = (__m512)c, w = (__m512)d;
  __m512 xy = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  __m512 zw = _mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w));
  return fold((vf)_mm512_add_ps(_mm512_shuffle_ps(xy, zw, 0x44), _mm512_shuffle_ps(xy, zw, 0xee)));
#else
  v4 x = fold(a), y = fold(b), z = fold(c), w = fold(d);
  v4 xy = __builtin_shufflevector(x, y, 0, 4, 1, 5) + __builtin_shufflevector(x, y, 2, 6, 3, 7);
  v4 zw = __builtin_shufflevector(z, w, 0, 4, 1, 5) + __builtin_shufflevector(z, w, 2, 6, 3, 7);
  return __builtin_shufflevector(xy, zw, 0, 1, 4, 5) + __builtin_shufflevector(xy, zw, 2, 3, 6, 7);
#endif
}

#if defined(HEADWISE_PAIRS)
HEADWISE_INLINE __m512i load_pairs(const bf16* from, int64_t left) {
  if (left >= 32) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << left) - 1), from);
}

// The elements of two rows in turn: those of the first 16 columns, and of the other 16.
HEADWISE_INLINE void interleave(__m512i even, __m512i odd, __m512i* first, __m512i* second) {
  alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  *first = _mm512_permutex2var_epi16(even, low, odd);
  *second = _mm512_permutex2var_epi16(even, high, odd);
}
#endif

HEADWISE_INLINE void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

}  // namespace HEADWISE_ISA
}  // namespace headwise
