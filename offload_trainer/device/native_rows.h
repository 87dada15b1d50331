// One row of a tensor: dense ← the kept elements of the full row, and back. Bits are moved; only a sum reads numbers.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MASKS 1
#include <immintrin.h>
#else
#define MASKS 0
#endif

// Into the second cache: into the first was slower, and so was asking for it in order to write. (Inlined by force: GCC
// drops calls of functions that do nothing else.)
#define ALWAYS inline __attribute__((always_inline))
ALWAYS void fetch(const void* at) { __builtin_prefetch(at, 0, 2); }

struct Run {  // consecutive kept elements: where they start in either row, and how many they are
  int64_t dense, full, length;
};

// What is kept of a row, in elements: `runs`, none where the row is whole. Where they are short, used in their place is
// either a bit of `masks` for every element of the full row, or the `singles` themselves.
struct Columns {
  int64_t length = 0;  // of a dense row
  int64_t full = 0;    // of a full row
  std::vector<Run> runs;
  std::vector<uint16_t> masks;  // an even number of them
  const int64_t* singles = nullptr;
};

inline float number(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline float number(uint16_t bits) { return number(uint32_t(bits) << 16); }  // bfloat16
inline double number(uint64_t bits) { return __builtin_bit_cast(double, bits); }
inline double number(uint8_t) { return 0; }  // no type of one byte is summed

// Calls move(dense, full, length) for every run; length is a constant 1 where they are singles.
template <class Move>
inline void each_run(const Columns& columns, Move move) {
  if (columns.singles) {
    for (int64_t j = 0; j < columns.length; ++j) move(j, columns.singles[j], 1);
  } else {
    for (const Run& run : columns.runs) move(run.dense, run.full, run.length);
  }
}

template <class Bits>
ALWAYS void fetch_row(const Columns& columns, const Bits* at) {
  constexpr int64_t most = 8192 / sizeof(Bits), line = 64 / sizeof(Bits);
  if (columns.singles) {
    for (int64_t k = 0; k < columns.full && k < most; k += line) fetch(at + k);
  } else {
    for (const Run& run : columns.runs) {
      for (int64_t k = 0; k < run.length && k < most; k += line) fetch(at + run.full + k);
    }
  }
}

#if MASKS
// Sixteen elements in 32-bit lanes, whatever their size.
template <class Bits>
struct Lanes {
  using Mask = __mmask16;
  static constexpr int count = 16;

  static __m512i load(const uint32_t* at) { return _mm512_loadu_si512(at); }
  static __m512i load(const uint16_t* at) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)); }
  static __m512i load(const uint32_t* at, Mask mask) { return _mm512_maskz_loadu_epi32(mask, at); }
  static __m512i load(const uint16_t* at, Mask mask) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  }
  static void store(uint32_t* at, __m512i lanes) { _mm512_storeu_si512(at, lanes); }
  static void store(uint16_t* at, __m512i lanes) { _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16(lanes)); }
  static void store(uint32_t* at, Mask mask, __m512i lanes) { _mm512_mask_storeu_epi32(at, mask, lanes); }
  static void store(uint16_t* at, Mask mask, __m512i lanes) {
    _mm256_mask_storeu_epi16(at, mask, _mm512_cvtepi32_epi16(lanes));
  }
  static __m512i compress(Mask mask, __m512i lanes) { return _mm512_maskz_compress_epi32(mask, lanes); }
  static __m512i expand(Mask mask, __m512i lanes) { return _mm512_maskz_expand_epi32(mask, lanes); }

  static __m512 numbers(__m512i lanes) {
    return _mm512_castsi512_ps(sizeof(Bits) == 4 ? lanes : _mm512_slli_epi32(lanes, 16));
  }
  static __m512d square(__m256 change, __m512d sum) {
    const __m512d wide = _mm512_cvtps_pd(change);
    return _mm512_fmadd_pd(wide, wide, sum);
  }
  static void add_squares(__m512 change, __m512d* sums) {
    sums[0] = square(_mm512_castps512_ps256(change), sums[0]);
    sums[1] = square(_mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(change), 1)), sums[1]);
  }
  static void add_squares(__m512i now, __m512i old, __m512d* sums) {
    add_squares(_mm512_sub_ps(numbers(now), numbers(old)), sums);
  }
};

#if defined(__AVX512VBMI2__)
// Thirty-two of two bytes.
template <>
struct Lanes<uint16_t> {
  using Mask = __mmask32;
  static constexpr int count = 32;

  static __m512i load(const uint16_t* at) { return _mm512_loadu_si512(at); }
  static __m512i load(const uint16_t* at, Mask mask) { return _mm512_maskz_loadu_epi16(mask, at); }
  static void store(uint16_t* at, __m512i lanes) { _mm512_storeu_si512(at, lanes); }
  static void store(uint16_t* at, Mask mask, __m512i lanes) { _mm512_mask_storeu_epi16(at, mask, lanes); }
  static __m512i compress(Mask mask, __m512i lanes) { return _mm512_maskz_compress_epi16(mask, lanes); }
  static __m512i expand(Mask mask, __m512i lanes) { return _mm512_maskz_expand_epi16(mask, lanes); }

  static void add_squares(__m512i now, __m512i old, __m512d* sums) {
    using Single = Lanes<uint32_t>;
    const __m512i upper = _mm512_set1_epi32(int(0xFFFF0000));  // odd elements are the upper halves of 32-bit lanes
    Single::add_squares(_mm512_slli_epi32(now, 16), _mm512_slli_epi32(old, 16), sums);
    Single::add_squares(_mm512_and_si512(now, upper), _mm512_and_si512(old, upper), sums);
  }
};
#endif

template <class Bits>
inline void gather_masked(Bits* dense, const Bits* full, const Columns& columns, const Bits* ahead) {
  using L = Lanes<Bits>;
  using Mask = typename L::Mask;
  constexpr int lanes = L::count;
  int64_t place = 0;
  for (int64_t from = 0; from < columns.full; from += lanes) {
    Mask mask;
    std::memcpy(&mask, columns.masks.data() + from / 16, sizeof(mask));
    if (!mask) continue;
    const int count = __builtin_popcount(mask);
    fetch(ahead + from);
    const __m512i found = from + lanes <= columns.full ? L::load(full + from) : L::load(full + from, mask);
    const __m512i kept = L::compress(mask, found);
    // What is written past the last of them is written over by the next, as long as the row is there.
    if (place + lanes <= columns.length) {
      L::store(dense + place, kept);
    } else {
      L::store(dense + place, Mask((uint64_t(1) << count) - 1), kept);
    }
    place += count;
  }
}

template <bool delta, class Bits>
inline double scatter_masked(const Bits* values, Bits* full, const Columns& columns, const Bits* ahead) {
  using L = Lanes<Bits>;
  using Mask = typename L::Mask;
  constexpr int lanes = L::count;
  int64_t place = 0;
  __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  for (int64_t from = 0; from < columns.full; from += lanes) {
    Mask mask;
    std::memcpy(&mask, columns.masks.data() + from / 16, sizeof(mask));
    if (!mask) continue;
    const int count = __builtin_popcount(mask);
    const Mask first = Mask((uint64_t(1) << count) - 1);
    const bool inside = place + lanes <= columns.length;
    fetch(ahead + from);
    const __m512i kept = L::expand(mask, inside ? L::load(values + place) : L::load(values + place, first));
    if (delta) L::add_squares(kept, L::load(full + from, mask), sums);
    L::store(full + from, mask, kept);
    place += count;
  }
  return delta ? _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1])) : 0;
}
#endif

// `ahead` is the full row that comes next, fetched meanwhile: the hardware foresees neither rows that are left out nor
// columns with gaps.
template <class Bits>
void gather_row(Bits* dense, const Bits* full, const Columns& columns, const Bits* ahead) {
#if MASKS
  if constexpr (sizeof(Bits) == 2 || sizeof(Bits) == 4) {
    if (!columns.masks.empty()) return gather_masked(dense, full, columns, ahead);
  }
#endif
  if (ahead != full) fetch_row(columns, ahead);
  each_run(columns, [=](int64_t to, int64_t from, int64_t length) {
    Bits* __restrict__ there = dense + to;
    const Bits* __restrict__ here = full + from;
    for (int64_t k = 0; k < length; ++k) there[k] = here[k];
  });
}

// full ← values. With `delta`, returns Σ (values − full before)².
template <bool delta, class Bits>
inline double scatter_run(const Bits* __restrict__ values, Bits* __restrict__ full, int64_t length) {
  int64_t k = 0;
  double sum = 0;
#if MASKS
  if constexpr (delta && (sizeof(Bits) == 2 || sizeof(Bits) == 4)) {
    using L = Lanes<Bits>;
    __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (; k + L::count <= length; k += L::count) {
      const __m512i now = L::load(values + k);
      L::add_squares(now, L::load(full + k), sums);
      L::store(full + k, now);
    }
    sum = _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1]));
  }
#endif
  if (delta) {
    double sums[16] = {};  // of every sixteenth, for an order of additions that vectors can keep
    for (; k + 16 <= length; k += 16) {
      for (int lane = 0; lane < 16; ++lane) {
        const double change = number(values[k + lane]) - number(full[k + lane]);
        sums[lane] += change * change;
        full[k + lane] = values[k + lane];
      }
    }
    for (double part : sums) sum += part;
  }
  for (; k < length; ++k) {
    if (delta) {
      const double change = number(values[k]) - number(full[k]);
      sum += change * change;
    }
    full[k] = values[k];
  }
  return sum;
}

template <bool delta, class Bits>
double scatter_row(const Bits* values, Bits* full, const Columns& columns, const Bits* ahead) {
#if MASKS
  if constexpr (sizeof(Bits) == 2 || sizeof(Bits) == 4) {
    if (!columns.masks.empty()) return scatter_masked<delta>(values, full, columns, ahead);
  }
#endif
  if (ahead != full) fetch_row(columns, ahead);
  double squared = 0;
  each_run(columns, [&](int64_t from, int64_t to, int64_t length) {
    squared += scatter_run<delta>(values + from, full + to, length);
  });
  return squared;
}
