// int8 activations on 16 ymm registers: what the AVX2 kernel and the VNNI kernels of 256 bits share. Included inside their target region
// and anonymous namespace (so no copy of it is left for the linker to pick); the file then defines rows_int8. No includes on purpose.
#pragma once

// R rows of q times 16 columns, which lie as bytes in `wide`: register tiles of up to 6 x 16, 12 accumulators. Ends with finish_int8.
template <int R>
PC_INLINE void rows_int8(const Group& g, const int8_t* q, int64_t row, const uint8_t* wide, int column, int vectors);

// Bytes between the weights in use and those that are fetched: 16 columns of a group are short runs with gaps, which hardware does not
// fetch.
constexpr int64_t kAhead = 8192;

constexpr int kWide = kMaxGroup / 4 * 64;

// Nibbles of 16 columns to bytes: [depth / 4][16 columns][4 k]; columns that do not exist become 0.
PC_INLINE void unpack(const uint32_t* weight, int64_t depth, int cols, bool both, uint8_t* wide) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i* w = reinterpret_cast<__m256i*>(wide);
  for (int64_t i = 0; i < depth / 8; ++i, w += 4, weight += cols) {
    _mm_prefetch(reinterpret_cast<const char*>(weight) + kAhead, _MM_HINT_T0);
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
    const __m256i b = both ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + 8)) : _mm256_setzero_si256();
    _mm256_store_si256(w, _mm256_and_si256(a, mask));
    _mm256_store_si256(w + 1, _mm256_and_si256(b, mask));
    _mm256_store_si256(w + 2, _mm256_and_si256(_mm256_srli_epi32(a, 4), mask));
    _mm256_store_si256(w + 3, _mm256_and_si256(_mm256_srli_epi32(b, 4), mask));
  }
}

PC_INLINE __m256i zeros(const uint8_t* zero, int c) {
  return zero ? _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero + c))) : _mm256_set1_epi32(8);
}

template <int R, int V>
PC_INLINE void finish_int8(const Group& g, int64_t row, int column, const int32_t* part) {
  __m256 scale[V];
  __m256i zero[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    scale[v] = _mm256_loadu_ps(g.scale + column + 8 * v);
    zero[v] = zeros(g.zero, column + 8 * v);
  }
  const char* sums = static_cast<const char*>(g.sums) + row * g.sum_stride;
  float* acc = g.acc + row * kNr + column;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r, sums += g.sum_stride, acc += kNr, part += 16) {
    // The sum of q fits int16, the upper half of zero's lanes is 0: vpmaddwd is a product that is cheaper than vpmulld.
    const __m256i sum = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(sums));
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const __m256i total = _mm256_load_si256(reinterpret_cast<const __m256i*>(part + 8 * v));
      const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(total, _mm256_madd_epi16(sum, zero[v])));
      _mm256_store_ps(acc + 8 * v, _mm256_fmadd_ps(exact, scale[v], _mm256_load_ps(acc + 8 * v)));
    }
  }
}

void group_int8(const Group& g) {
  alignas(32) uint8_t wide[kWide];
  for (int column = 0; column < g.cols; column += 16) {
    const int vectors = g.cols - column >= 16 ? 2 : 1;
    unpack(g.weight + column, g.depth, g.cols, vectors == 2, wide);
    const int8_t* q = static_cast<const int8_t*>(g.rows);
    int rows = 0;
    for (int64_t r = 0; r < g.count; r += rows, q += rows * g.row_stride) {
      rows = next_rows(g.count - r);
      switch (rows) {
        case 1:
          rows_int8<1>(g, q, r, wide, column, vectors);
          break;
        case 2:
          rows_int8<2>(g, q, r, wide, column, vectors);
          break;
        case 3:
          rows_int8<3>(g, q, r, wide, column, vectors);
          break;
        case 4:
          rows_int8<4>(g, q, r, wide, column, vectors);
          break;
        case 5:
          rows_int8<5>(g, q, r, wide, column, vectors);
          break;
        default:
          rows_int8<6>(g, q, r, wide, column, vectors);
      }
    }
  }
}
