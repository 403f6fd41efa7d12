// A team of threads that walks through the phases of a piece of work. Each phase is cut into chunks;
// whoever comes takes the next one. A phase begins when all chunks before it are done, and not when
// all threads are there: a thread that the kernel has put aside holds nobody up unless it has a chunk.

#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr std::chrono::nanoseconds kNanosecond{1};
constexpr int kSpins = 2000;  // at a phase's end, before the core is offered to others

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

class Work {
 public:
  virtual int64_t chunks(int64_t phase) const = 0;
  virtual void run(int64_t phase, int64_t chunk, int thread) const = 0;

 protected:
  ~Work() = default;
};

class Team {
 public:
  // `threads`: the caller's included.
  Team(int threads, int64_t max_phases) : progress_(new Progress[max_phases]) {
    for (int thread = 1; thread < threads; thread++)
      helpers_.emplace_back([this, thread] { help(thread); });
  }

  ~Team() {
    stopping_ = true;
    wake(turn_.load() + 1);  // of which nobody finds a chunk
    for (std::thread& helper : helpers_) helper.join();
  }

  int threads() const { return int(helpers_.size()) + 1; }

  // Returns when all is done. One caller at a time. `clock_ns`, for measurements: when this began, and
  // when each phase had ended.
  void run(const Work& work, int64_t phases, int64_t* clock_ns = nullptr) {
    clock_ns_ = clock_ns;
    note(0);
    const uint32_t turn = turn_.load(std::memory_order_relaxed) + 1;
    work_.store(&work, std::memory_order_relaxed);
    phases_.store(phases, std::memory_order_relaxed);
    for (int64_t phase = 0; phase < phases; phase++) {
      Progress& p = progress_[phase];
      p.chunks.store(work.chunks(phase), std::memory_order_relaxed);
      p.done.store(0, std::memory_order_relaxed);
      p.next.store(uint64_t(turn) << 32, std::memory_order_release);
    }
    wake(turn);
    take_part(turn, 0);
  }

 private:
  struct alignas(64) Progress {
    std::atomic<uint64_t> next{0};  // turn << 32 | chunk: nobody takes a chunk of another turn
    std::atomic<int64_t> chunks{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  // A helper may be late by any number of turns. All it reads before it holds a chunk is atomic, and
  // while it holds one the turn cannot end.
  void take_part(uint32_t turn, int thread) {
    const int64_t phases = phases_.load(std::memory_order_relaxed);
    for (int64_t phase = 0; phase < phases; phase++) {
      Progress& p = progress_[phase];
      for (uint64_t next = p.next.load(std::memory_order_acquire);;) {
        if (uint32_t(next >> 32) != turn) return;
        const int64_t chunk = int64_t(next & 0xFFFFFFFFu);
        if (chunk >= p.chunks.load(std::memory_order_relaxed)) break;
        if (!p.next.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
        work_.load(std::memory_order_relaxed)->run(phase, chunk, thread);
        p.done.fetch_add(1, std::memory_order_release);
        next = p.next.load(std::memory_order_acquire);
      }
      for (int spins = 0; p.done.load(std::memory_order_acquire) <
                          p.chunks.load(std::memory_order_relaxed); spins++) {
        if (turn_.load(std::memory_order_relaxed) != turn) return;
        if (spins < kSpins) relax(); else sched_yield();
      }
      if (thread == 0) note(phase + 1);
    }
  }

  void note(int64_t index) {
    if (clock_ns_)
      clock_ns_[index] = std::chrono::steady_clock::now().time_since_epoch() / kNanosecond;
  }

  void help(int thread) {
    for (uint32_t seen = 0; !stopping_;) {
      const uint32_t turn = turn_.load(std::memory_order_acquire);
      if (turn == seen) {
        syscall(SYS_futex, &turn_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        continue;
      }
      take_part(turn, thread);
      seen = turn;
    }
  }

  void wake(uint32_t turn) {
    turn_.store(turn, std::memory_order_release);
    if (!helpers_.empty())
      syscall(SYS_futex, &turn_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  std::unique_ptr<Progress[]> progress_;
  std::atomic<const Work*> work_{nullptr};
  int64_t* clock_ns_ = nullptr;  // the caller's own
  std::atomic<int64_t> phases_{0};
  std::atomic<uint32_t> turn_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> helpers_;
};

}  // namespace
