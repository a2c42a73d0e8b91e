// The pool of threads: every item exactly once, whatever the number of items, threads and pools.
#include "threads.hpp"

#include <memory>
#include <vector>

#include "check.hpp"

using namespace gptoss;

namespace {

// Runs `items` items and looks that each was done once, by a thread that exists, and that all is
// done when run returns: the counts are plain integers.
void count(Pool& pool, i64 items) {
    std::vector<int> done(std::size_t(items), 0);
    std::vector<int> by(std::size_t(pool.size()), 0);
    pool.run(items, [&](i64 item, int thread) { done[std::size_t(item)]++, by[std::size_t(thread)]++; });
    i64 sum = 0;
    for (int n : by) sum += n;
    CHECK(sum == items, "%d of %d items by %d threads", int(sum), int(items), pool.size());
    for (i64 i = 0; i < items; i++) CHECK(done[std::size_t(i)] == 1, "item %d: %d times", int(i), done[std::size_t(i)]);
}

const i64 ITEMS[] = {0, 1, 2, 3, 7, 64, 1000};

void test_sizes() {
    for (int threads : {1, 2, 3, 5, 9}) {
        Pool pool(threads);
        CHECK(pool.size() == threads, "%d", pool.size());
        for (i64 items : ITEMS) count(pool, items);  // asleep before each
        pool.begin();
        for (i64 items : ITEMS) count(pool, items);
        pool.end();
        for (i64 items : ITEMS) count(pool, items);
    }
}

// Operations so short that a thread is still leaving one while the next begins; each reads what
// the one before wrote, and its work lies where the last one's lay.
void test_short_operations() {
    for (int threads : {2, 3, 4}) {
        Pool pool(threads);
        std::vector<i64> x(8), y(8);
        pool.begin();
        for (i64 round = 1; round <= 3000; round++) {
            const i64 items = 2 + round % 7;
            pool.run(items, [&](i64 i, int) { y[std::size_t(i)] = x[std::size_t(items - 1 - i)] + round; });
            pool.run(items, [&](i64 i, int) { x[std::size_t(i)] = y[std::size_t(i)]; });
            for (i64 i = 1; i < items; i++) CHECK(x[std::size_t(i)] >= round, "round %d", int(round));
        }
        pool.end();
    }
}

void test_steps() {
    Pool pool(3);
    for (int step = 0; step < 300; step++) {
        pool.begin();
        for (int i = 0; i < step % 4; i++) count(pool, 5);
        pool.end();
        if (step % 3 == 0) count(pool, 4);
        if (step % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // all fall asleep
    }
    pool.begin(), pool.begin(), pool.end(), pool.end();
    count(pool, 9);
}

void test_many_pools() {
    for (int i = 0; i < 200; i++) {
        Pool pool(1 + i % 4);
        if (i % 2) pool.begin();  // ends while its threads spin
        if (i % 3) count(pool, 6);
        if (i % 5 == 0) pool.end();
    }
    std::vector<std::unique_ptr<Pool>> pools;
    for (int i = 0; i < 5; i++) pools.push_back(std::make_unique<Pool>(3));
    for (auto& each : pools) each->begin();
    for (int round = 0; round < 20; round++)
        for (auto& each : pools) count(*each, 10);
}

void test_uneven_work() {  // one item longer than all others, at either end
    Pool pool(3);
    for (i64 slow : {0, 40}) {
        std::vector<int> done(41);
        pool.run(41, [&](i64 i, int) {
            if (i == slow) std::this_thread::sleep_for(std::chrono::milliseconds(3));
            done[std::size_t(i)]++;
        });
        for (int n : done) CHECK(n == 1, "%d times", n);
    }
}

void test_the_pool() {
    CHECK(usable_cores() >= 1, "%d", usable_cores());
    CHECK(pool().size() == usable_cores(), "%d", pool().size());
    for (int threads : {3, 1, 0, 2, 2, 5}) {
        set_threads(threads);
        CHECK(pool().size() == (threads ? threads : 1), "%d for %d", pool().size(), threads);
        for (i64 items : ITEMS) count(pool(), items);
    }
}

}  // namespace

int main() {
    test_sizes();
    test_short_operations();
    test_steps();
    test_many_pools();
    test_uneven_work();
    test_the_pool();
    return report("threads");
}
