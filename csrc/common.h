// Shared by all kernels: dtypes, memory, threads.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "lanes.h"

constexpr int64_t kBlock = 64;    // tokens in a tile
constexpr float kNever = -1e30f;  // a logit z so low that exp(z) and z * exp(z) are 0

// The same codes as DTYPE_CODES in op_backends/native_library.py.
enum Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

// Defines expo_fast_sizeof_NAME(), which returns the size of a struct that Python fills. When the
// library is loaded, native_library.check_struct_sizes compares it with the size in Python.
#define EXPO_FAST_SIZEOF(name, Struct) \
  extern "C" int64_t expo_fast_sizeof_##name() { return sizeof(Struct); }

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The range [begin, end) of n work items that thread t of `threads` processes.
struct Share {
  int64_t begin, end;

  Share(int64_t n, int t, int threads) : begin(n * t / threads), end(n * (t + 1) / threads) {}
};

// Calls f with a value of the C++ type that the code stands for.
template <class F>
void with_dtype(int32_t dtype, F f) {
  if (dtype == kFloat32) f(float{});
  if (dtype == kBFloat16) f(bf16{});
  if (dtype == kFloat16) f(fp16{});
}

// Marks memory that is not written yet. It does nothing, except in the library that tests build with
// EXPO_FAST_POISON: there every float in it becomes NaN, so that a read before the first write shows.
inline void poison([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(EXPO_FAST_POISON)
  std::memset(memory, 0xff, bytes);
#endif
}

// A buffer of `size` elements, aligned to 64 bytes and not initialized.
template <class T>
struct Scratch {
  explicit Scratch(int64_t size) : data(new (std::align_val_t{64}) T[size]) {
    poison(data.get(), size * sizeof(T));
  }
  struct Free { void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); } };
  std::unique_ptr<T[], Free> data;
};

// Runs f(t) on each thread. An exception must not leave an OpenMP region, so the first one is
// thrown again after the region.
template <class F>
void parallel(int threads, F f) {
  std::vector<std::exception_ptr> errors(threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    try {
      f(t);
    } catch (...) {
      errors[t] = std::current_exception();
    }
  }
  for (auto& error : errors)
    if (error) std::rethrow_exception(error);
}

// Calls f(t, i) for each i < n on the next free thread t. A result must not depend on the thread.
template <class F>
void parallel_each(int threads, int64_t n, F f) {
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(t, i);
  });
}

inline thread_local char last_error[1024];

// Calls f. Returns 0, or 1 with the reason in last_error.
template <class F>
int32_t guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(last_error, error.what(), sizeof last_error - 1);
    return 1;
  }
}

// A team of threads that run the same sequence of phases, with a barrier after each phase.
class Team {
 public:
  // Runs f(team, t) on every thread t = 0, 1, ... that OpenMP provides.
  template <class F>
  static void run(int threads, F f) {
    Team team;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      team.size = omp_get_num_threads();
      f(team, omp_get_thread_num());
    }
  }

  // Runs one phase: each of f(0), ..., f(n - 1) runs on the next free thread. No thread returns
  // before all calls have finished.
  template <class F>
  void each(int64_t n, F f) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
    wait();
  }

 private:
  int size = 0;
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> waiting{0};
  alignas(64) std::atomic<int> phase{0};

  // A barrier that yields. With more threads than free cores, a thread that only spins takes the
  // core from the thread that it waits for: with OpenMP's own barrier, decoding is then 13 times
  // slower.
  void wait() {
    const int now = phase.load(std::memory_order_relaxed);
    if (waiting.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      waiting.store(0, std::memory_order_relaxed);
      next.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase.load(std::memory_order_acquire) == now; ++spins)
      if (spins > 1000) sched_yield();
  }
};
