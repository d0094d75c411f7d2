// The current stream of device.cpp's devices, for csrc/torch/backend.cpp, in place of
// libc10_cuda's. Apart from device.cpp because CUDA's headers and the emulator's have names in
// common.
#include <c10/cuda/CUDAStream.h>

extern "C" c10::StreamId fastops_current_stream(c10::DeviceIndex device);

namespace c10::cuda {
CUDAStream getCurrentCUDAStream(DeviceIndex device) {
  const Device of(DeviceType::CUDA, device);
  return CUDAStream(CUDAStream::UNCHECKED,
                    Stream(Stream::UNSAFE, of, fastops_current_stream(device)));
}
cudaStream_t CUDAStream::stream() const { return reinterpret_cast<cudaStream_t>(id()); }
}  // namespace c10::cuda
