#include "threads.hpp"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace gptoss {

namespace {

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    asm volatile("yield");
#endif
}

// With more threads than cores, spinning alone would keep the one that works from working.
void wait_a_little(int& spins) {
    if (++spins < 2000) return pause();
    spins = 0;
    std::this_thread::yield();
}

}  // namespace

Pool::Pool(int threads) {
    for (int t = 1; t < threads; t++) workers_.emplace_back([this, t] { serve(t); });
}

Pool::~Pool() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::begin() {
    if (workers_.empty()) return;
    {
        std::lock_guard lock(mutex_);
        awake_ = true;
    }
    wake_.notify_all();
}

void Pool::end() { awake_ = false; }

void Pool::share(std::int64_t items, Call call, void* work) {
    bool alone = !awake_;
    if (alone) begin();
    call_ = call, work_ = work, items_ = items;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(int(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1);
    // Another Python thread may have ended its step meanwhile, and the workers gone to sleep.
    if (!awake_) {
        std::lock_guard lock(mutex_);
        wake_.notify_all();
    }
    take(0);
    for (int spins = 0; busy_.load(std::memory_order_acquire);) wait_a_little(spins);
    if (alone) end();
}

void Pool::take(int thread) noexcept {
    for (;;) {
        std::int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
        if (item >= items_) return;
        call_(work_, item, thread);
    }
}

void Pool::serve(int thread) {
    std::uint64_t seen = 0;
    for (;;) {
        for (int spins = 0; round_.load(std::memory_order_acquire) == seen;) {
            if (awake_ && !stop_.load(std::memory_order_relaxed)) {
                wait_a_little(spins);
                continue;
            }
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || awake_ || round_.load() != seen; });
            if (stop_) return;
        }
        seen++;
        take(thread);
        busy_.fetch_sub(1, std::memory_order_release);
    }
}

int usable_cores() {
    int cores = std::max(1, int(std::thread::hardware_concurrency()));
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = std::max(1, CPU_COUNT(&set));
    // cgroup v2: "quota period" or "max period", in the group this process is in and those above.
    std::string line, inside;
    for (std::ifstream file("/proc/self/cgroup"); std::getline(file, line);)
        if (line.rfind("0::", 0) == 0) inside = line.substr(3);
    while (true) {
        std::ifstream file("/sys/fs/cgroup" + inside + "/cpu.max");
        double quota = 0, period = 0;
        if (file >> quota >> period && period > 0 && quota > 0)
            cores = std::max(1, std::min(cores, int(quota / period + 0.999)));
        if (inside.empty()) break;
        inside.erase(inside.find_last_of("/"));
    }
#endif
    return cores;
}

namespace {
std::unique_ptr<Pool> the_pool;
std::mutex making;

// A forked child has no threads but the one that forked: it makes a pool of its own.
void heed_forks() {
#ifdef __linux__
    static const int once = pthread_atfork(nullptr, nullptr, [] { (void)the_pool.release(); });
    (void)once;
#endif
}
}  // namespace

Pool& pool() {
    heed_forks();
    std::lock_guard lock(making);
    if (!the_pool) the_pool = std::make_unique<Pool>(usable_cores());
    return *the_pool;
}

void set_threads(int threads) {
    heed_forks();
    std::lock_guard lock(making);
    if (the_pool && the_pool->size() == std::max(1, threads)) return;
    the_pool.reset();
    the_pool = std::make_unique<Pool>(std::max(1, threads));
}

}  // namespace gptoss
