// The inner steps of tiles of 24 sums on zmm registers, in an order that compilers may not change: next to what follows the products they
// run out of registers and spill. Included inside the target region and the anonymous namespace of a kernel file. No includes on purpose.
#pragma once

#if defined(__GNUC__)
PC_INLINE __m512i broadcast(const char* four) {
  __m512i u;
  __asm__ volatile("vpbroadcastd %[four],%[u]" : [u] "=v"(u) : [four] "m"(*reinterpret_cast<const char (*)[4]>(four)));
  return u;
}
PC_INLINE void dot(__m512i& c, __m512i u, __m512i w) { __asm__ volatile("vpdpbusd %[w],%[u],%[c]" : [c] "+v"(c) : [u] "v"(u), [w] "v"(w)); }
#else
PC_INLINE __m512i broadcast(const char* four) { return _mm512_set1_epi32(load32(four)); }
PC_INLINE void dot(__m512i& c, __m512i u, __m512i w) { c = _mm512_dpbusd_epi32(c, u, w); }
#endif
