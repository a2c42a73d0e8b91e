// A pool of threads that share the items of one operation after another.
//
// Between begin() and end() the threads spin for the next operation, because one token takes some
// three hundred operations of a few hundred microseconds; outside they sleep. Items are taken in
// order from one counter, so who computes an item is open, what it computes is not.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace gptoss {

class Pool {
public:
    explicit Pool(int threads);  // the caller is one of them
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return int(workers_.size()) + 1; }

    // Calls work(item, thread) once for each item in [0, items) and returns when all are done.
    // thread is in [0, size()). Not reentrant; one operation at a time. `cost` is roughly the bytes
    // or multiplications of all items: what takes less than waking the others is done by the caller.
    template <class Work>
    void run(std::int64_t items, Work&& work, std::int64_t cost = WORTH) {
        if (items <= 0) return;
        if (items == 1 || cost < WORTH || workers_.empty()) {
            for (std::int64_t i = 0; i < items; i++) work(i, 0);
            return;
        }
        auto call = [](void* w, std::int64_t i, int t) { (*static_cast<std::remove_reference_t<Work>*>(w))(i, t); };
        share(items, call, &work);
    }

    void begin();  // a step starts: stay awake
    void end();    // it is over: sleep

    static constexpr std::int64_t WORTH = 1 << 19;

private:
    using Call = void (*)(void*, std::int64_t, int);
    void share(std::int64_t items, Call call, void* work);
    void serve(int thread);
    void take(int thread) noexcept;  // work that throws ends the program: others still use it

    std::vector<std::thread> workers_;
    // What is to be done; written before round_ is raised, read after it is seen.
    Call call_ = nullptr;
    void* work_ = nullptr;
    std::int64_t items_ = 0;
    alignas(64) std::atomic<std::int64_t> next_{0};
    alignas(64) std::atomic<std::uint64_t> round_{0};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<bool> awake_{false};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Cores this process may use: its affinity, and its control group's quota where there is one.
int usable_cores();

// The pool every operation runs in; made at first use with usable_cores() threads.
Pool& pool();
void set_threads(int threads);  // replaces the pool; at least 1

}  // namespace gptoss
