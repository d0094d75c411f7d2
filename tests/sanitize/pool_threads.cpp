// Runs the pool of csrc/torch under a sanitizer: eight threads take and give back memory of many
// sizes, each other's too, as results of fastops and as tensors of torch's, with DataPtr and raw,
// while the pool is trimmed, bounded, switched off, and put in the place of torch's allocator and
// out again. Every block is filled, and looked at before it goes.
#include "../../csrc/torch/pool.h"

#include <c10/core/Allocator.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace fastops;

std::atomic<int> failures{0}, blocks{0};

// A block that knows what it is filled with.
class Block {
 public:
  Block(c10::DataPtr memory, size_t size, int value)
      : memory_(std::move(memory)), data_(memory_.get()), size_(size), value_(value) {
    fill();
  }
  Block(void* raw, size_t size, int value) : data_(raw), size_(size), value_(value), raw_(true) {
    fill();
  }
  Block& operator=(Block&& b) noexcept {
    std::swap(memory_, b.memory_);
    std::swap(data_, b.data_);
    std::swap(size_, b.size_);
    std::swap(value_, b.value_);
    std::swap(raw_, b.raw_);
    return *this;
  }
  Block(Block&& b) noexcept
      : memory_(std::move(b.memory_)),
        data_(b.data_),
        size_(b.size_),
        value_(b.value_),
        raw_(std::exchange(b.raw_, false)) {
    b.data_ = nullptr;
  }
  ~Block() {
    if (data_ == nullptr) return;
    const auto* bytes = static_cast<const unsigned char*>(data_);
    for (size_t i = 0; i < size_; i += 512)
      if (bytes[i] != value_) ++failures;
    if (bytes[size_ - 1] != value_) ++failures;
    // Through whichever allocator is torch's by now.
    if (raw_) c10::GetAllocator(c10::DeviceType::CPU)->raw_deallocate(data_);
  }

 private:
  void fill() {
    ++blocks;
    std::memset(data_, value_, size_);
  }
  c10::DataPtr memory_;
  void* data_;
  size_t size_;
  int value_;
  bool raw_ = false;
};

void work(unsigned k, std::deque<Block>* shared, std::mutex* lock) {
  std::mt19937 random(k);
  std::vector<Block> own;
  for (int i = 0; i < 400; ++i) {
    const size_t size = size_t{1} << (12 + random() % 12) | random() % 5000;
    const int value = static_cast<int>(random() % 256);
    c10::Allocator* const torchs = c10::GetAllocator(c10::DeviceType::CPU);
    switch (random() % 3) {
      case 0:
        own.emplace_back(pool_allocator()->allocate(size), size, value);
        break;
      case 1:
        own.emplace_back(torchs->allocate(size), size, value);
        break;
      case 2:
        own.emplace_back(torchs->raw_allocate(size), size, value);
        break;
    }
    if (random() % 2) own.erase(own.begin() + static_cast<long>(random() % own.size()));
    if (random() % 4 == 0 && !own.empty()) {
      std::lock_guard<std::mutex> hold(*lock);
      shared->push_back(std::move(own.back()));
      own.pop_back();
      if (shared->size() > 8) shared->pop_front();
    }
    if (own.size() > 8) own.clear();
    switch (random() % 64) {
      case 0:
        pool_trim();
        break;
      case 1:
        pool_set_limit(size_t{1} << (20 + random() % 8));
        break;
      case 2:
        pool_enable(false);
        break;
      case 3:
        pool_stop_serving();
        break;
      default:
        pool_enable(true);
        pool_serve_torch();
    }
    if (pool_info().limit == 0) ++failures;
  }
}

}  // namespace

int main() {
  c10::Allocator* const torchs = c10::GetAllocator(c10::DeviceType::CPU);
  pool_info();  // makes the pool
  for (int round = 0; round < 3; ++round) {
    std::deque<Block> shared;
    std::mutex lock;
    std::vector<std::thread> workers;
    for (unsigned k = 0; k < 8; ++k) workers.emplace_back(work, 10 * round + k, &shared, &lock);
    for (auto& w : workers) w.join();
    pool_stop_serving();
    shared.clear();
    // All is given back, and torch has its own allocator again.
    if (pool_info().in_use != 0 || c10::GetAllocator(c10::DeviceType::CPU) != torchs) ++failures;
  }
  std::printf("%d blocks, %d failures\n", blocks.load(), failures.load());
  return failures != 0;
}
