// The norm of all gradients: sums of squares over chunks, in one parallel region, and the factor
// that clips it.
#include "../kernels/gradient_norm.h"

#include "../formulas/gradient_norm.h"
#include "parallel.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 65536;  // elements a thread takes at least

template <class scalar_t>
double squares(const scalar_t* g, int64_t n) {
  using IO = VecIO<scalar_t>;
  using V = typename IO::V;
  constexpr int64_t kRun =
      2 * kFew * IO::size;  // elements that are added up in the lanes of two sums
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    V sum[2] = {V(0), V(0)};
    int next = 0;
    for_each_vector<IO::size>(begin, begin + kRun < n ? begin + kRun : n,
                              [&](int64_t i, auto count) {
                                V v[IO::count];
                                IO::load(g + i, count, v);
                                if (count < IO::size) IO::mask_tail(count, 0, v);
                                for (int k = 0; k < IO::count; ++k, next ^= 1)
                                  sum[next] = sum[next] + v[k] * v[k];
                              });
    total += sum_of_lanes(sum[0] + sum[1]);
  }
  return total;
}

Error sums_of_squares(const GradientNormArgs& a, double* sums) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    int64_t chunks = 0, total = 0;
    for (int64_t k = 0; k < a.count; ++k)
      chunks += gradient_norm_chunks(a.tensors[k].n), total += a.tensors[k].n;
    if (chunks == 0) return nullptr;
    const GradientTensor* tensors = a.tensors;
    const int64_t mean = total / chunks < 1 ? 1 : total / chunks;
    cpu::parallel(chunks, kGrain / mean < 1 ? 1 : kGrain / mean, [=](int64_t begin, int64_t end) {
      int64_t chunk = 0;  // the first of tensor k
      for (int64_t k = 0; chunk < end; chunk += gradient_norm_chunks(tensors[k++].n)) {
        const int64_t n = tensors[k].n;
        const auto* g = static_cast<const scalar_t*>(tensors[k].g);
        for (int64_t j = begin > chunk ? begin - chunk : 0;
             j < gradient_norm_chunks(n) && chunk + j < end; ++j) {
          const int64_t at = j * kGradientNormChunk;
          sums[chunk + j] =
              squares(g + at, n - at < kGradientNormChunk ? n - at : kGradientNormChunk);
        }
      }
    });
    return nullptr;
  });
}

Error clip(const ClipArgs& a) {
  double sum = 0;
  for (int64_t k = 0; k < a.count; ++k) sum += a.sums[k];
  const Clip made(sum, a.grad_scale ? *a.grad_scale : 1.0f, static_cast<float>(a.max_norm));
  *a.norm = made.norm;
  *a.divisor = made.divisor;
  return nullptr;
}

}  // namespace

extern constinit const GradientNormKernel gradient_norm_kernel{&sums_of_squares, &clip};

}  // namespace fastops::CPU_CAPABILITY
