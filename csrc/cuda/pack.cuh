// Between memory of a dtype and registers of what it is computed in: 16-byte packs, their
// alignment, and the only two functions through which kernels touch global memory. No formula, no
// launch.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(FASTOPS_EMULATION)
#define FASTOPS_SHARED(T, name, n) FASTOPS_EMULATED_SHARED(T, name, n)
#else
#define FASTOPS_SHARED(T, name, n) __shared__ T name[n]
#endif

namespace fastops::cuda {

// What a dtype is computed in.
template <class scalar_t>
using real_of = std::conditional_t<sizeof(scalar_t) == 2, float, scalar_t>;

constexpr int kPackBytes = 16;  // the widest load and store of every architecture since sm_70
template <class scalar_t>
constexpr int pack_size = kPackBytes / static_cast<int>(sizeof(scalar_t));

template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  T v[n];
};

// ------------------------------------------------------------------------------------------------
// global memory

template <class T>
__device__ __forceinline__ T load(const T* p) {
#if defined(FASTOPS_EMULATION)
  emulation::loads(p, sizeof(T), alignof(T));
#endif
  if constexpr (sizeof(T) == kPackBytes) {
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    T value;
    memcpy(&value, &words, sizeof words);
    return value;
  } else {
    return *p;
  }
}
template <class T>
__device__ __forceinline__ void store(T* p, const T& value) {
#if defined(FASTOPS_EMULATION)
  emulation::stores(p, sizeof(T), alignof(T));
#endif
  if constexpr (sizeof(T) == kPackBytes) {
    uint4 words;
    memcpy(&words, &value, sizeof words);
#if defined(FASTOPS_EMULATION)
    *reinterpret_cast<uint4*>(p) = words;
#else
    // By assignment, nvcc 13.0 stores word by word, and no load passes __stwb, which says that it
    // clobbers memory. This does not, because no kernel reads what it has stored.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words.x), "r"(words.y),
                 "r"(words.z), "r"(words.w));
#endif
  } else {
    *p = value;
  }
}
template <int n, class T>
__device__ __forceinline__ Pack<T, n> load_pack(const T* p) {
  return load(reinterpret_cast<const Pack<T, n>*>(p));
}
template <int n, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, n>& pack) {
  store(reinterpret_cast<Pack<T, n>*>(p), pack);
}

// n elements from or to a 16-byte boundary, in packs.
template <class real, class scalar_t, int n>
__device__ __forceinline__ void load_wide(const scalar_t* p, real (&v)[n]) {
  constexpr int size = pack_size<scalar_t>;
  static_assert(n % size == 0);
#pragma unroll
  for (int i = 0; i < n; i += size) {
    const auto pack = load_pack<size>(p + i);
#pragma unroll
    for (int k = 0; k < size; ++k) v[i + k] = static_cast<real>(pack.v[k]);
  }
}
template <class real, class scalar_t, int n>
__device__ __forceinline__ void store_wide(scalar_t* p, const real (&v)[n]) {
  constexpr int size = pack_size<scalar_t>;
  static_assert(n % size == 0);
#pragma unroll
  for (int i = 0; i < n; i += size) {
    Pack<scalar_t, size> pack;
#pragma unroll
    for (int k = 0; k < size; ++k) pack.v[k] = static_cast<scalar_t>(v[i + k]);
    store_pack<size>(p + i, pack);
  }
}

// n elements, one or whole packs, as they were loaded. They are converted when they are needed: no
// load then waits for the conversion of another's result.
template <class scalar_t, int n>
struct Raw {
  static constexpr int size = n == 1 ? 1 : pack_size<scalar_t>;
  static_assert(n % size == 0);
  Pack<scalar_t, size> pack[n / size];

  __device__ __forceinline__ void load_from(const scalar_t* p) {
#pragma unroll
    for (int k = 0; k < n / size; ++k) pack[k] = load_pack<size>(p + k * size);
  }
  __device__ __forceinline__ scalar_t& operator[](int k) { return pack[k / size].v[k % size]; }
  template <class real>
  __device__ __forceinline__ void values(real (&v)[n]) const {
#pragma unroll
    for (int k = 0; k < n; ++k) v[k] = static_cast<real>(pack[k / size].v[k % size]);
  }
};

// One element, or whole packs.
template <class real, class scalar_t, int n>
__device__ __forceinline__ void load_columns(const scalar_t* p, real (&v)[n]) {
  Raw<scalar_t, n> raw;
  raw.load_from(p);
  raw.values(v);
}
template <class real, class scalar_t, int n>
__device__ __forceinline__ void store_columns(scalar_t* p, const real (&v)[n]) {
  if constexpr (n == 1) {
    store(p, static_cast<scalar_t>(v[0]));
  } else {
    store_wide(p, v);
  }
}

// The first `count` of n elements, one by one; the others become `filler`.
template <class real, class scalar_t, int n>
__device__ __forceinline__ void load_narrow(const scalar_t* p, int64_t count, real (&v)[n],
                                            real filler = real(0)) {
#pragma unroll
  for (int k = 0; k < n; ++k) v[k] = k < count ? static_cast<real>(load(p + k)) : filler;
}
template <class real, class scalar_t, int n>
__device__ __forceinline__ void store_narrow(scalar_t* p, int64_t count, const real (&v)[n]) {
#pragma unroll
  for (int k = 0; k < n; ++k)
    if (k < count) store(p + k, static_cast<scalar_t>(v[k]));
}

// ------------------------------------------------------------------------------------------------
// alignment

template <class... T>
__host__ __device__ __forceinline__ bool aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % kPackBytes) == 0;
}

// A run of n elements: `head` up to a 16-byte boundary, whole packs, and what is left.
struct AlignedSpan {
  int64_t n, head, packs;
};

// The cut that is right for all of these buffers at once; where their boundaries do not fall
// together, all is head.
template <class scalar_t, class... T>
__host__ __device__ __forceinline__ AlignedSpan aligned_span(int64_t n, int size,
                                                             const scalar_t* first,
                                                             const T*... others) {
  const uintptr_t over = reinterpret_cast<uintptr_t>(first) % kPackBytes;
  const int64_t head = over ? static_cast<int64_t>((kPackBytes - over) / sizeof(scalar_t)) : 0;
  if (head >= n || !aligned(first + head, others + head...)) return {n, n, 0};
  return {n, head, (n - head) / size};
}

// Calls pack(i) for the first element of every pack and single(i) for every other element, among
// `threads` threads.
template <int size, class PackBody, class SingleBody>
__device__ __forceinline__ void for_each_pack(const AlignedSpan& cut, int64_t thread,
                                              int64_t threads, PackBody pack, SingleBody single) {
  for (int64_t k = thread; k < cut.packs; k += threads) pack(cut.head + k * size);
  const int64_t packed = cut.packs * size;
  for (int64_t k = thread; k < cut.n - packed; k += threads) single(k < cut.head ? k : k + packed);
}

}  // namespace fastops::cuda
