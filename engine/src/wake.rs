//! Waiting and being woken: epoll(7), eventfd(2) and timerfd_create(2).
//!
//! A shard waits in [`Epoll::wait`] until a device is ready, its [`AlarmClock`] rings, or another thread calls
//! [`EventFd::notify`]. Nothing here polls: with nothing to do and no deadline it waits for ever.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use libc::c_int;

use crate::clock::Timestamp;
use crate::sys::{Context, DeviceError, check, would_block};

/// A level-triggered set of descriptors to wait for.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// An empty set.
    ///
    /// # Errors
    /// Where the kernel has no more descriptors.
    pub fn new() -> Result<Self, DeviceError> {
        // SAFETY: epoll_create1(2) takes no pointers.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
            .context(|| "create an epoll instance".into())?;
        // SAFETY: the descriptor was just opened, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Waits for something to read (or an error) on a descriptor, too; its events are told as `token`. Closing the
    /// descriptor removes it.
    ///
    /// # Errors
    /// What the kernel says, as `EEXIST`.
    pub fn add(&self, fd: impl AsFd, token: u64) -> Result<(), DeviceError> {
        let fd = fd.as_fd().as_raw_fd();
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        // SAFETY: the kernel reads one `epoll_event`.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) })
            .map(drop)
            .context(|| format!("wait for descriptor {fd}"))
    }

    /// Waits until a descriptor is ready or `timeout` has passed (`None`: for ever), and fills `events`.
    ///
    /// The kernel counts whole milliseconds here: the timeout is rounded up, so that nobody wakes before a deadline
    /// only to wait again. A signal ends the wait with no events.
    ///
    /// # Errors
    /// What the kernel says; none is expected.
    pub fn wait(&self, events: &mut Readiness, timeout: Option<Duration>) -> io::Result<()> {
        events.ready = 0;
        let timeout = timeout.map_or(-1, |timeout| {
            c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX)
        });
        // SAFETY: the kernel writes at most `events.list.len()` events to `events.list`.
        let result = check(unsafe {
            libc::epoll_wait(
                self.0.as_raw_fd(),
                events.list.as_mut_ptr(),
                events.list.len() as c_int,
                timeout,
            )
        });
        match result {
            Ok(ready) => events.ready = ready as usize,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Room for the events of one wait.
pub struct Readiness {
    list: Vec<libc::epoll_event>,
    ready: usize,
}

impl Readiness {
    /// Room for `capacity` events; more than that wait for the next turn.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { list: vec![libc::epoll_event { events: 0, u64: 0 }; capacity.max(1)], ready: 0 }
    }

    /// Whether the last wait ended without an event.
    pub fn is_empty(&self) -> bool {
        self.ready == 0
    }

    /// The tokens of the descriptors that the last wait found ready.
    pub fn tokens(&self) -> impl Iterator<Item = u64> + '_ {
        self.list[..self.ready].iter().map(|event| event.u64)
    }
}

/// Wakes a thread that waits in [`Epoll::wait`]. Level-triggered: readable from [`Self::notify`] to [`Self::clear`].
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A quiet one.
    ///
    /// # Errors
    /// Where the kernel has no more descriptors.
    pub fn new() -> Result<Self, DeviceError> {
        // SAFETY: eventfd(2) takes no pointers.
        let fd = check(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) })
            .context(|| "create an event descriptor".into())?;
        // SAFETY: the descriptor was just opened, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Wakes whoever waits. Never blocks; waking twice is waking once.
    ///
    /// # Errors
    /// None is expected.
    pub fn notify(&self) -> io::Result<()> {
        match crate::sys::write_vectored(self.0.as_fd(), &1u64.to_ne_bytes(), &[]) {
            Ok(_) => Ok(()),
            // The counter is full, so the descriptor is readable already.
            Err(error) if would_block(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes it quiet again, and tells whether it was not. Call it before looking at what was announced, never after.
    ///
    /// # Errors
    /// None is expected.
    pub fn clear(&self) -> io::Result<bool> {
        match crate::sys::read(self.0.as_fd(), &mut [0; 8]) {
            Ok(_) => Ok(true),
            Err(error) if would_block(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// Wakes a thread that waits in [`Epoll::wait`] at a time of [`monotonic_now`](crate::clock::monotonic_now), which goes
/// on while the machine sleeps. The timeouts of epoll do not: after a night, what was due in a minute would be due a
/// minute later. Level-triggered: readable from the time it was set to until [`Self::silence`].
#[derive(Debug)]
pub struct AlarmClock {
    fd: OwnedFd,
    /// When it rings, or has rung; `None`: not at all.
    set_to: Option<Timestamp>,
}

impl AlarmClock {
    /// One that is not set.
    ///
    /// # Errors
    /// Where the kernel has no more descriptors.
    pub fn new() -> Result<Self, DeviceError> {
        // SAFETY: timerfd_create(2) takes no pointers.
        let fd = check(unsafe {
            libc::timerfd_create(libc::CLOCK_BOOTTIME, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC)
        })
        .context(|| "create a timer".into())?;
        // SAFETY: the descriptor was just opened, and nobody else has it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, set_to: None })
    }

    /// Lets it ring at `deadline` at the latest. Where it is set to an earlier time, it is left so: deadlines mostly
    /// move on, and ringing once for nothing costs less than setting it for each packet.
    ///
    /// # Errors
    /// None is expected.
    pub fn ring_by(&mut self, deadline: Timestamp) -> io::Result<()> {
        if self.set_to.is_some_and(|set_to| set_to <= deadline) {
            return Ok(());
        }
        // A time of zero would switch it off.
        let nanos = deadline.as_nanos().max(1);
        let at = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: libc::timespec {
                tv_sec: libc::time_t::try_from(nanos / 1_000_000_000).unwrap_or(libc::time_t::MAX),
                tv_nsec: (nanos % 1_000_000_000) as libc::c_long,
            },
        };
        // SAFETY: the kernel reads one `itimerspec`, and writes none, for the last pointer is null.
        check(unsafe {
            libc::timerfd_settime(
                self.fd.as_raw_fd(),
                libc::TFD_TIMER_ABSTIME,
                &raw const at,
                std::ptr::null_mut(),
            )
        })?;
        self.set_to = Some(deadline);
        Ok(())
    }

    /// Makes it quiet after it has rung; it is not set any more.
    ///
    /// # Errors
    /// None is expected.
    pub fn silence(&mut self) -> io::Result<()> {
        match crate::sys::read(self.fd.as_fd(), &mut [0; 8]) {
            Ok(_) => self.set_to = None,
            // It has not rung yet.
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl AsFd for AlarmClock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::monotonic_now;

    const SHORT: Duration = Duration::from_millis(20);
    /// Longer than the scheduler keeps a thread waiting between two statements.
    const NOT_YET: Duration = Duration::from_millis(500);
    const LONG: Duration = Duration::from_secs(3_600);

    /// Waits until the alarm rings, and silences it.
    fn rung_at(epoll: &Epoll, alarm: &mut AlarmClock) -> Timestamp {
        let mut events = Readiness::with_capacity(1);
        epoll.wait(&mut events, Some(Duration::from_secs(10))).unwrap();
        assert_eq!(events.tokens().count(), 1);
        let rang = monotonic_now();
        alarm.silence().unwrap();
        epoll.wait(&mut events, Some(Duration::ZERO)).unwrap();
        assert!(events.is_empty(), "silent until it is set again");
        rang
    }

    #[test]
    fn an_alarm_clock_rings_at_the_earliest_time_that_it_was_told_and_not_before() {
        let (epoll, mut alarm) = (Epoll::new().unwrap(), AlarmClock::new().unwrap());
        epoll.add(&alarm, 1).unwrap();
        let began = monotonic_now();
        alarm.ring_by(began + LONG).unwrap();
        alarm.ring_by(began + SHORT).unwrap();
        alarm.ring_by(began + LONG).unwrap();
        assert!(rung_at(&epoll, &mut alarm) >= began + SHORT);
        alarm.ring_by(Timestamp::ORIGIN).unwrap();
        rung_at(&epoll, &mut alarm);
    }

    #[test]
    fn silencing_an_alarm_clock_too_early_leaves_it_set() {
        let (epoll, mut alarm) = (Epoll::new().unwrap(), AlarmClock::new().unwrap());
        epoll.add(&alarm, 1).unwrap();
        alarm.ring_by(monotonic_now() + NOT_YET).unwrap();
        alarm.silence().unwrap();
        rung_at(&epoll, &mut alarm);
    }

    #[test]
    fn an_alarm_clock_goes_on_while_the_machine_sleeps() {
        let alarm = AlarmClock::new().unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", alarm.fd.as_raw_fd())).unwrap();
        assert!(info.contains(&format!("clockid: {}\n", libc::CLOCK_BOOTTIME)), "{info}");
    }

    #[test]
    fn a_notified_event_is_readable_until_it_is_cleared() {
        let (epoll, event) = (Epoll::new().unwrap(), EventFd::new().unwrap());
        epoll.add(&event, 7).unwrap();
        let mut events = Readiness::with_capacity(4);
        epoll.wait(&mut events, Some(Duration::ZERO)).unwrap();
        assert_eq!(events.tokens().count(), 0);

        event.notify().unwrap();
        event.notify().unwrap();
        for _ in 0..2 {
            epoll.wait(&mut events, None).unwrap();
            assert_eq!(events.tokens().collect::<Vec<_>>(), [7]);
        }

        assert!(event.clear().unwrap());
        assert!(!event.clear().unwrap());
        epoll.wait(&mut events, Some(Duration::ZERO)).unwrap();
        assert_eq!(events.tokens().count(), 0);
    }

    #[test]
    fn a_thread_is_woken_by_another_thread() {
        let (epoll, event) = (Epoll::new().unwrap(), EventFd::new().unwrap());
        epoll.add(&event, 1).unwrap();
        let mut events = Readiness::with_capacity(1);
        std::thread::scope(|scope| {
            scope.spawn(|| event.notify().unwrap());
            epoll.wait(&mut events, Some(Duration::from_secs(10))).unwrap();
        });
        assert_eq!(events.tokens().count(), 1);
    }
}
