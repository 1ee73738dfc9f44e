// CUDA kernels on the host: included in front of a .cuh in place of the CUDA runtime, it lets a C++ compiler
// build the same source.
//
// Every CUDA thread is a fibre with its own stack. A fibre runs until it waits at a barrier or for the other
// lanes of a shuffle, or ends; blocks run one after the other. A seed sets the order in which warps, and
// lanes in a warp, are resumed: a result that lacks a barrier changes with the seed. Fibres that wait for
// what cannot happen are reported, and the launch fails. Shared memory is filled with nans before each block,
// and lies on the heap in its exact size, where AddressSanitizer guards it.
//
// Not shown here: races between blocks, between a warp's lanes inside one statement, and speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cuda_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class State { ready, barrier, warp, ended };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
  Index thread;
  State state = State::ready;
  const char* operation = "";
  unsigned mask = 0;
  unsigned rendezvous = 0;  // shuffles so far
  std::vector<std::pair<const char*, int>> accesses;  // of shared memory since the last one: address, bytes
};

// Wavefronts that accesses of shared memory took, the fewest possible, and the worst ratio of the two.
struct Conflicts {
  int64_t wavefronts = 0, least = 0;
  int worst = 0;
};

constexpr int LANES = 32;
constexpr size_t STACK = 256 * 1024;

class Device {
 public:
  unsigned seed = 0;      // order of warps and lanes: 0 ascending, 1 descending, else random at every round
  std::string error;      // of the first launch that failed
  int64_t switches = 0;
  Conflicts conflicts;
  Index block, grid_size, block_size;

  const Index& thread() const { return fibres_[current_].thread; }
  char* shared() const { return shared_.get(); }

  void wait(State state, const char* operation, unsigned mask) {
    Fibre& fibre = fibres_[current_];
    fibre.state = state, fibre.operation = operation, fibre.mask = mask;
    leave(fibre, false);
  }

  // Each lane of the mask gives `value` and receives what lane source(lane) gave.
  template <class T, class F>
  T exchange(unsigned mask, T value, const char* operation, F source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Fibre& fibre = fibres_[current_];
    const int warp = current_ / LANES, lane = current_ % LANES;
    if (!(mask >> lane & 1))
      fail(std::string(operation) + ": lane " + std::to_string(lane) + " is not in its own mask");
    uint64_t* slots =
        slots_[warp][fibre.rendezvous++ % 2];  // a lane is at most one exchange ahead of another
    std::memcpy(&slots[lane], &value, sizeof value);
    wait(State::warp, operation, mask);
    const int from = source(lane);
    if (from >= 0 && from < LANES && (mask >> from & 1)) std::memcpy(&value, &slots[from], sizeof value);
    return value;
  }

  // Each lane of the warp gives `value` and sees what all 32 gave, until its next exchange but one.
  template <class T>
  const T* gather(const T& value, const char* operation) {
    static_assert(sizeof(T) <= sizeof(Wide));
    Fibre& fibre = fibres_[current_];
    T* slots = reinterpret_cast<T*>(wide_[current_ / LANES].values[fibre.rendezvous++ % 2]);
    slots[current_ % LANES] = value;
    wait(State::warp, operation, 0xffffffffu);
    return slots;
  }

  void access(const void* address, int bytes) {
    fibres_[current_].accesses.emplace_back(static_cast<const char*>(address), bytes);
  }

  // The warp's lanes access `bytes` each. A wavefront serves 32 banks of 4 bytes, and at most 128 bytes.
  void count_conflicts(const char* const* addresses, int bytes) {
    const int together = std::min(LANES, 128 / std::max(bytes, 4));
    for (int first = 0; first < LANES; first += together) {
      std::set<uintptr_t> words;
      for (int i = first; i < first + together; i++)
        for (int byte = 0; byte < bytes; byte += 4)
          words.insert((reinterpret_cast<uintptr_t>(addresses[i]) + byte) / 4);
      int banks[LANES] = {}, most = 0;
      for (uintptr_t word : words) most = std::max(most, ++banks[word % LANES]);
      const int least = (int(words.size()) + LANES - 1) / LANES;
      conflicts.wavefronts += most, conflicts.least += least;
      conflicts.worst = std::max(conflicts.worst, (most + least - 1) / least);
    }
  }

  int launch(int grid, int threads, int shared, const std::function<void()>& body) {
    if (!error.empty()) return 1;
    if (grid < 1 || threads < 1 || threads > 1024)
      fail("launch: grid " + std::to_string(grid) + ", threads " + std::to_string(threads));
    grid_size = {unsigned(grid), 1, 1}, block_size = {unsigned(threads), 1, 1};
    body_ = &body;
    while (int(fibres_.size()) < threads) {
      fibres_.emplace_back();
      fibres_.back().stack = std::make_unique<char[]>(STACK);
    }
    slots_.resize((threads + LANES - 1) / LANES);
    wide_.resize(slots_.size());
    random_.seed(seed);
    for (int b = 0; b < grid && error.empty(); b++) {
      block = {unsigned(b), 0, 0};
      shared_.reset(static_cast<char*>(std::aligned_alloc(16, shared > 0 ? shared : 16)));
      std::memset(shared_.get(), 0xff, shared > 0 ? shared : 16);
      run_block(threads);
    }
    return error.empty() ? 0 : 1;
  }

  void fail(const std::string& what) {
    if (error.empty()) error = "block " + std::to_string(block.x) + ": " + what;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Slots {
    uint64_t values[2][LANES];
    uint64_t* operator[](int i) { return values[i]; }
  };
  struct Wide {
    uint64_t words[3];
  };
  struct WideSlots {
    Wide values[2][LANES];
  };

  std::vector<Fibre> fibres_;
  std::vector<Slots> slots_;
  std::vector<WideSlots> wide_;
  std::unique_ptr<char, Free> shared_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  int current_ = 0;
  std::mt19937 random_;

  static Device& device();

  static void entry() {
    Device& d = device();
    d.arrived(nullptr);
    (*d.body_)();
    Fibre& fibre = d.fibres_[d.current_];
    fibre.state = State::ended, fibre.operation = "the end";
    d.leave(fibre, true);
  }

  void arrived(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_size_);
#endif
    (void)fake_stack;
  }

  void leave(Fibre& fibre, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fibre.fake_stack, scheduler_stack_, scheduler_size_);
#endif
    (void)for_good;
    swapcontext(&fibre.context, &scheduler_);
    arrived(fibre.fake_stack);
  }

  void resume(int i) {
    current_ = i;
    switches++;
    Fibre& fibre = fibres_[i];
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fibre.stack.get(), STACK);
#endif
    swapcontext(&scheduler_, &fibre.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  void start(int i) {
    Fibre& fibre = fibres_[i];
    fibre.thread = {unsigned(i), 0, 0};
    fibre.state = State::ready, fibre.rendezvous = 0, fibre.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fibre.stack.get(), STACK);  // frames of a fibre that never ended
#endif
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = STACK;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &Device::entry, 0);
  }

  std::vector<int> order(int n) {
    std::vector<int> found(n);
    for (int i = 0; i < n; i++) found[i] = seed == 1 ? n - 1 - i : i;
    if (seed > 1) std::shuffle(found.begin(), found.end(), random_);
    return found;
  }

  // Count what the warp's lanes accessed since the last rendezvous, if all did the same number of times.
  void count_accesses(int first, int last) {
    const size_t times = fibres_[first].accesses.size();
    bool alike = last - first == LANES && times > 0;
    for (int i = first; i < last; i++) alike = alike && fibres_[i].accesses.size() == times;
    for (size_t n = 0; alike && n < times; n++) {
      const char* addresses[LANES];
      for (int i = 0; i < LANES; i++) addresses[i] = fibres_[first + i].accesses[n].first;
      count_conflicts(addresses, fibres_[first].accesses[n].second);
    }
    for (int i = first; i < last; i++) fibres_[i].accesses.clear();
  }

  // Let lanes of the warp go on whose exchange is complete. Return false if there are none.
  bool meet(int first, int last) {
    bool met = false;
    for (int i = first; i < last; i++) {
      Fibre& fibre = fibres_[i];
      if (fibre.state != State::warp) continue;
      bool complete = true;
      for (int j = 0; j < LANES && complete; j++)
        if (fibre.mask >> j & 1) {
          const Fibre* other = first + j < last ? &fibres_[first + j] : nullptr;
          complete = other && other->state == State::warp && other->mask == fibre.mask &&
                     other->rendezvous == fibre.rendezvous &&
                     std::strcmp(other->operation, fibre.operation) == 0;
        }
      if (!complete) continue;
      const unsigned mask = fibre.mask;
      if (mask == 0xffffffffu) count_accesses(first, last);
      for (int j = 0; first + j < last; j++)
        if (mask >> j & 1) fibres_[first + j].state = State::ready;
      met = true;
    }
    return met;
  }

  // Run until every lane of the warp waits at a barrier, waits for lanes that do not come, or has ended.
  void run_warp(int warp, int threads) {
    const int first = warp * LANES, last = std::min(threads, first + LANES);
    do {
      for (int i : order(last - first))
        if (fibres_[first + i].state == State::ready) resume(first + i);
    } while (error.empty() && meet(first, last));
  }

  void run_block(int threads) {
    for (int i = 0; i < threads; i++) start(i);
    const int warps = (threads + LANES - 1) / LANES;
    for (;;) {
      for (int warp : order(warps)) {
        run_warp(warp, threads);
        if (!error.empty()) return;
      }
      int waiting = 0, ended = 0;
      for (int i = 0; i < threads; i++) {
        waiting += fibres_[i].state == State::barrier;
        ended += fibres_[i].state == State::ended;
      }
      for (int warp = 0; warp < warps; warp++)
        count_accesses(warp * LANES, std::min(threads, (warp + 1) * LANES));
      if (ended == threads) return;
      if (waiting < threads) return fail("deadlock: " + positions(threads));
      for (int i = 0; i < threads; i++) fibres_[i].state = State::ready;
    }
  }

  // "threads 0-31 at __syncthreads, 32-255 at the end"
  std::string positions(int threads) const {
    std::string text = "threads";
    for (int i = 0, j; i < threads; i = j) {
      for (j = i + 1; j < threads && std::strcmp(fibres_[j].operation, fibres_[i].operation) == 0;) j++;
      text +=
          (i ? ", " : " ") + std::to_string(i) + "-" + std::to_string(j - 1) + " at " + fibres_[i].operation;
    }
    return text;
  }
};

inline Device& device() {
  static Device d;
  return d;
}

inline Device& Device::device() { return cuda_host::device(); }

}  // namespace cuda_host

#define threadIdx (cuda_host::device().thread())
#define blockIdx (cuda_host::device().block)
#define blockDim (cuda_host::device().block_size)
#define gridDim (cuda_host::device().grid_size)

inline void __syncthreads() { cuda_host::device().wait(cuda_host::State::barrier, "__syncthreads", 0); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_host::device().exchange(mask, 0, "__syncwarp", [](int lane) { return lane; });
}

// Exchange among the lanes of a group of `width`. If the source lies outside, a lane keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cuda_host::device().exchange(
      mask, value, "__shfl_sync", [=](int lane) { return lane / width * width + (source & (width - 1)); });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return cuda_host::device().exchange(mask, value, "__shfl_xor_sync", [=](int lane) {
    const int source = lane ^ bits;
    return source / width <= lane / width ? source : lane;
  });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_host::device().exchange(mask, value, "__shfl_up_sync", [=](int lane) {
    return lane % width >= int(delta) ? lane - int(delta) : lane;
  });
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_host::device().exchange(mask, value, "__shfl_down_sync", [=](int lane) {
    return lane % width + int(delta) < width ? lane + int(delta) : lane;
  });
}

// Fibres are switched only at barriers and exchanges, so a plain operation is atomic.
inline int atomicAdd(int* p, int v) { return std::exchange(*p, *p + v); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return std::exchange(*p, *p + v); }

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

#define INFOPRO_DYNAMIC_SHARED(name) float4* name = reinterpret_cast<float4*>(cuda_host::device().shared())

namespace infopro::gpu {

using Stream = void*;
using Error = int;
constexpr Error success = 0;

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), int grid, int threads, int shared, Stream,
             const Arguments&... arguments) {
  return cuda_host::device().launch(grid, threads, shared, [&] { kernel(arguments...); });
}

// Puts each part on the heap by itself, in its exact size.
class Workspace {
 public:
  explicit Workspace(void* start) : real_(start != nullptr) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    for (void* part : parts_) std::free(part);
  }

  template <class T>
  T* take(int64_t n) {
    used_ += n * int64_t(sizeof(T));
    if (!real_) return nullptr;
    const size_t bytes = size_t(std::max<int64_t>(n, 1)) * sizeof(T);
    void* part = nullptr;
    if (posix_memalign(&part, 16, bytes) != 0) std::abort();
    std::memset(part, 0xff, bytes);
    parts_.push_back(part);
    return static_cast<T*>(part);
  }

  int64_t used() const { return used_; }

 private:
  bool real_;
  std::vector<void*> parts_;
  int64_t used_ = 0;
};

}  // namespace infopro::gpu
