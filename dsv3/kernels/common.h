// What the CPU kernels share: a pool of threads, a single-threaded sgemm, scratch memory.
#pragma once
#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <type_traits>

namespace dsv3 {

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads a parallel_for may use, the caller included: $DSV3_NUM_THREADS, else the CPUs of this process, at
// most 8.
inline int num_threads() {
  static const int n = [] {
    const char* text = std::getenv("DSV3_NUM_THREADS");
    const int wanted = text ? std::atoi(text) : std::min<int>(std::thread::hardware_concurrency(), 8);
    return std::max(wanted, 1);
  }();
  return n;
}

// One pool for the process: with g++ the function-local static below is one object even across shared
// libraries. The caller works too, and waits only for workers that have joined the job: a worker that the
// system has not scheduled yet (or that a fork has lost) delays nothing. Idle workers spin for 50 us, then
// sleep.
class Pool {
 public:
  using Run = void (*)(void*, int64_t);

  static Pool& get() {
    static Pool* pool = new Pool;  // never destroyed: workers outlive static destructors
    return *pool;
  }

  // Returns false, having done nothing, when another job (or an enclosing one) has the pool.
  bool run(int64_t tasks, Run run, void* context) {
    if (busy_.test_and_set()) return false;
    run_ = run, context_ = context, tasks_ = tasks, next_ = 0;
    open_ = true;
    ++epoch_;
    if (sleepers_ > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    work();
    open_ = false;
    for (int spins = 0; joined_ > 0; ++spins) spins < 1000 ? pause_cpu() : (void)sched_yield();
    busy_.clear();
    return true;
  }

 private:
  Pool() {
    for (int i = 1; i < num_threads(); ++i) std::thread([this] { loop(); }).detach();
  }

  void work() {
    for (int64_t i; (i = next_++) < tasks_;) run_(context_, i);
  }

  void loop() {
    for (uint64_t seen = 0;;) {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      while (epoch_ == seen && std::chrono::steady_clock::now() < deadline) pause_cpu();
      if (epoch_ == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, [&] { return epoch_ != seen; });
        --sleepers_;
      }
      seen = epoch_;
      ++joined_;  // before reading open_: run() closes the job first and counts second
      if (open_) work();
      --joined_;
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<bool> open_{false};
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> joined_{0}, sleepers_{0};
  std::atomic<int64_t> next_{0};
  Run run_ = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Calls fn(i) once for every i in [0, n_tasks), on several threads, in no particular order; returns when all
// are done. fn must not throw. A nested call, or one made while another kernel has the pool, runs on the
// calling thread.
template <class Fn>
void parallel_for(int64_t n_tasks, Fn&& fn) {
  if (n_tasks > 1 && num_threads() > 1) {
    auto call = [](void* context, int64_t i) { (*static_cast<std::remove_reference_t<Fn>*>(context))(i); };
    if (Pool::get().run(n_tasks, call, const_cast<void*>(static_cast<const void*>(&fn)))) return;
  }
  for (int64_t i = 0; i < n_tasks; ++i) fn(i);
}

// 64-byte aligned, uninitialised memory for n floats; it belongs to the calling thread until its next call of
// scratch.
inline float* scratch(size_t n) {
  struct Buffer {
    float* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  const size_t bytes = (n * sizeof(float) + 63) / 64 * 64;
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    buffer.bytes = bytes;
    if (!buffer.data) {
      std::fprintf(stderr, "dsv3: no memory for %zu bytes of scratch\n", bytes);
      std::abort();
    }
  }
  return buffer.data;
}

struct Onednn {
  int (*sgemm)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t,
               float, float*, int64_t);
  int (*get_concurrency)(int*);
  int (*set_concurrency)(int);
};

// MindSpore's own oneDNN, already in the process.
inline const Onednn& onednn() {
  static const Onednn library = [] {
    void* handle =
        dlsym(RTLD_DEFAULT, "dnnl_sgemm") ? RTLD_DEFAULT : dlopen("libdnnl.so.3", RTLD_LAZY | RTLD_GLOBAL);
    auto find = [&](const char* name) {
      void* symbol = dlsym(handle, name);
      if (!symbol) {
        std::fprintf(stderr, "dsv3: %s not found in MindSpore's oneDNN; set DSV3_KERNELS=reference\n", name);
        std::abort();
      }
      return symbol;
    };
    Onednn found;
    found.sgemm = reinterpret_cast<decltype(found.sgemm)>(find("dnnl_sgemm"));
    found.get_concurrency = reinterpret_cast<decltype(found.get_concurrency)>(
        find("dnnl_threadpool_interop_get_max_concurrency"));
    found.set_concurrency = reinterpret_cast<decltype(found.set_concurrency)>(
        find("dnnl_threadpool_interop_set_max_concurrency"));
    return found;
  }();
  return library;
}

// C[M, N] = alpha op(A) op(B) + beta C, row-major, on the calling thread alone. trans is 'N' or 'T', ld the
// row stride. MindSpore's oneDNN is built on a thread pool that only its own kernels attach: without one it
// runs serially, and the (thread-local) concurrency of 1 keeps it from cutting the work into pieces.
// Restored, since MindSpore reads it too.
inline void sgemm(char transA, char transB, int64_t M, int64_t N, int64_t K, float alpha, const float* A,
                  int64_t lda, const float* B, int64_t ldb, float beta, float* C, int64_t ldc) {
  if (M <= 0 || N <= 0) return;
  const Onednn& dnnl = onednn();
  int before = 1;
  dnnl.get_concurrency(&before);
  dnnl.set_concurrency(1);
  dnnl.sgemm(transA, transB, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
  dnnl.set_concurrency(before);
}

// exp(x) for x <= 0 (or above it by a rounding) with a relative error below 3e-7; 0 below the smallest normal
// number; NaN for NaN. No branches, so that the compiler vectorises it. 1.5 * 2^23 leaves the integer k of
// 2^k in the low bits.
inline float exp_nonpositive(float x) {
  constexpr float magic = 12582912.0f, low = -87.33654f;
  const float clamped = x < low ? low : x;
  const float shifted = clamped * 1.44269504f + magic;
  const float k = shifted - magic;
  const float r = clamped - k * 0.693145751953125f - k * 1.42860682e-6f;
  float q = 0.0013933652f;
  q = q * r + 0.0083631817f;
  q = q * r + 0.041666467f;
  q = q * r + 0.16666576f;
  q = q * r + 0.5f;
  const float p = 1.0f + (r + r * r * q);
  const float scale = __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u);
  return x < low ? 0.0f : p * scale;
}

}  // namespace dsv3
