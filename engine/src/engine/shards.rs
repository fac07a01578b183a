//! The shards' threads: started once, told and asked while they run, joined at the end.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::EngineError;
use crate::clock::monotonic_now;
use crate::core::Core;
use crate::handoffs::{BegunSessions, HANDOFF_QUEUE, Handoffs};
use crate::messages::{Command, EventKind, Events};
use crate::shard::{HandoffSender, Links, Shard};
use crate::sys::DeviceError;
use crate::wake::EventFd;

/// How long a question to a shard may take. A shard answers between two turns, so this is generous.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the shards' threads may take to end. They do so between two turns, too; who has not, never will.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// A shard that has not been started yet.
type Waiting = Box<dyn FnOnce() -> std::io::Result<()> + Send>;

/// The threads of an engine, from before their start until after their end.
pub(super) struct Shards {
    waiting: Mutex<Vec<Waiting>>,
    running: Vec<JoinHandle<()>>,
    /// Closed when the last thread has ended.
    ended: Option<Receiver<()>>,
    pub(super) senders: Vec<CommandSender>,
    pub(super) events: Events,
    started: bool,
}

/// The way to one shard.
#[derive(Clone)]
pub(super) struct CommandSender {
    queue: Sender<Command>,
    wake: Arc<EventFd>,
}

impl CommandSender {
    /// A shard that has ended takes no commands, and needs none.
    pub(super) fn send(&self, command: Command) -> bool {
        self.queue.send(command).is_ok() && self.wake.notify().is_ok()
    }
}

impl Shards {
    pub(super) fn new(events: Events) -> Self {
        Self {
            waiting: Mutex::default(),
            running: Vec::new(),
            ended: None,
            senders: Vec::new(),
            events,
            started: false,
        }
    }

    pub(super) fn add<C: Core + Send + 'static>(&mut self, shard: Shard<C>, sender: CommandSender) {
        self.waiting.get_mut().unwrap_or_else(PoisonError::into_inner).push(Box::new(move || shard.run()));
        self.senders.push(sender);
    }

    pub(super) fn start(&mut self) -> Result<(), EngineError> {
        if self.started {
            return Err(EngineError::State(
                "the engine has already been started and cannot be started again".into(),
            ));
        }
        self.started = true;
        let waiting = std::mem::take(self.waiting.get_mut().unwrap_or_else(PoisonError::into_inner));
        let (runs, ended) = mpsc::channel();
        self.ended = Some(ended);
        for (number, run) in waiting.into_iter().enumerate() {
            let events = self.events.clone();
            let runs = runs.clone();
            let name = format!("shard-{number}");
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || {
                    // A panic is a defect; it must take the gateway down by name, not leave half of it running.
                    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => events.push(EventKind::ShardFailed, format!("{name}: {error}")),
                        Err(panic) => {
                            let what = panic
                                .downcast_ref::<String>()
                                .map(String::as_str)
                                .or_else(|| panic.downcast_ref::<&str>().copied())
                                .unwrap_or("panic");
                            events.push(EventKind::ShardFailed, format!("{name}: {what}"));
                        }
                    }
                    drop(runs);
                })
                .map_err(|error| DeviceError::new(format!("start the thread of shard {number}"), error))?;
            self.running.push(thread);
        }
        Ok(())
    }

    /// Ends every thread and joins it. The second time nothing happens.
    ///
    /// # Errors
    /// If one hangs. It is left behind then, with its devices, and ends with the process.
    pub(super) fn stop(&mut self) -> Result<(), EngineError> {
        self.waiting.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        for sender in &self.senders {
            sender.send(Command::Stop);
        }
        self.senders.clear();
        let in_time = self
            .ended
            .take()
            .is_none_or(|ended| ended.recv_timeout(END_TIMEOUT) == Err(RecvTimeoutError::Disconnected));
        let mut hanging = Vec::new();
        for thread in self.running.drain(..) {
            if !in_time && !thread.is_finished() {
                hanging.push(thread.thread().name().unwrap_or_default().to_owned());
            } else if thread.join().is_err() {
                self.events.push(EventKind::ShardFailed, "a shard's thread could not be joined");
            }
        }
        if hanging.is_empty() {
            return Ok(());
        }
        let names = hanging.join(", ");
        Err(EngineError::State(format!("{names} did not end within {END_TIMEOUT:?}")))
    }

    /// Asks every shard the same question.
    pub(super) fn ask<T>(&self, question: impl Fn(SyncSender<T>) -> Command) -> Result<Vec<T>, EngineError> {
        if self.running.is_empty() {
            return Err(EngineError::State("the engine is not running".into()));
        }
        let answers: Vec<_> = self
            .senders
            .iter()
            .map(|sender| {
                let (reply, answer) = mpsc::sync_channel(1);
                sender.send(question(reply));
                answer
            })
            .collect();
        let deadline = monotonic_now() + ANSWER_TIMEOUT;
        answers
            .into_iter()
            .enumerate()
            .map(|(number, answer)| {
                answer.recv_timeout(deadline.since(monotonic_now())).map_err(|_| {
                    EngineError::State(format!("shard {number} did not answer within {ANSWER_TIMEOUT:?}"))
                })
            })
            .collect()
    }

    pub(super) fn tell_all(&self, command: impl Fn() -> Command) {
        for sender in &self.senders {
            sender.send(command());
        }
    }
}

/// The queues between the shards, and from Python to each.
pub(super) fn link_up(shards: u8, events: &Events) -> Result<Vec<(Links, CommandSender)>, DeviceError> {
    let mut receivers = Vec::new();
    let mut handoff_senders = Vec::new();
    for _ in 0..shards {
        let wake = Arc::new(EventFd::new()?);
        let (queue, handoffs) = mpsc::sync_channel(HANDOFF_QUEUE);
        let begun = BegunSessions::default();
        handoff_senders.push(HandoffSender { queue, begun: begun.clone(), wake: Arc::clone(&wake) });
        receivers.push((wake, Handoffs::new(handoffs), begun));
    }
    Ok(receivers
        .into_iter()
        .map(|(wake, handoffs, begun)| {
            let (queue, commands) = mpsc::channel();
            let sender = CommandSender { queue, wake: Arc::clone(&wake) };
            let shards = handoff_senders.clone();
            let events = events.clone();
            (Links { wake, commands, handoffs, begun, shards, reserver: None, events }, sender)
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;
    use crate::drop_reason::{DropCounters, DropReason};
    use crate::handoffs::Handoff;
    use crate::tunnel::OWN_SESSIONS;
    use crate::wire::test_packets::{ALICE, Template, payload};
    use crate::wire::{Gso, GsoKind, Offload};

    fn three_shards() -> Vec<Links> {
        let events = Events::new(EventFd::new().unwrap());
        link_up(3, &events).unwrap().into_iter().map(|(links, _)| links).collect()
    }

    fn misdirected() -> Handoff {
        Handoff::Misdirected {
            from: std::net::SocketAddrV4::new([192, 0, 2, 1].into(), 1).into(),
            datagram: vec![4; 32],
        }
    }

    /// How often each shard was woken since the last call.
    fn wakes(shards: &[Links]) -> Vec<u64> {
        let count = |links: &Links| {
            let mut count = [0; 8];
            // An error: it was not woken.
            _ = crate::sys::read(links.wake.as_fd(), &mut count);
            u64::from_ne_bytes(count)
        };
        shards.iter().map(count).collect()
    }

    #[test]
    fn word_of_sessions_reaches_every_other_shard_however_full_the_queue_before_it_is() {
        let shards = three_shards();
        while shards[0].shards[1].queue.try_send(misdirected()).is_ok() {}
        shards[0].tell_what_began([7, 8]);
        let heard: Vec<_> = shards.iter().map(|links| Vec::from(links.begun.take())).collect();
        assert_eq!(heard, [vec![], vec![7, 8], vec![7, 8]], "all but the one where they began");
    }

    #[test]
    fn word_of_the_sessions_of_a_turn_wakes_each_other_shard_once_and_nobody_if_there_is_none() {
        let shards = three_shards();
        shards[0].tell_what_began([]);
        assert_eq!(wakes(&shards), [0, 0, 0]);
        shards[0].tell_what_began(0..OWN_SESSIONS as u32);
        assert_eq!(wakes(&shards), [0, 1, 1]);
        shards[2].tell_what_began([7]);
        assert_eq!(wakes(&shards), [1, 1, 0]);
    }

    #[test]
    fn the_handoffs_of_a_turn_wake_each_shard_that_gets_some_once() {
        let shards = three_shards();
        let mut drops = DropCounters::default();
        shards[0].hand_over([1, 2, 1, 1, 2].map(|shard| (shard, misdirected())), &mut drops);
        assert_eq!(wakes(&shards), [0, 1, 1]);
        shards[0].hand_over([], &mut drops);
        assert_eq!(wakes(&shards), [0, 0, 0]);
        assert_eq!(drops.nonzero().count(), 0);
    }

    #[test]
    fn what_is_in_the_queue_is_not_lost_because_its_shard_cannot_be_woken() {
        let shards = three_shards();
        let deaf = std::fs::File::open("/dev/null").unwrap();
        let wake = shards[1].wake.as_raw_fd();
        // SAFETY: both descriptors are open; whoever writes to the second, or closes it, finds an open one.
        assert_eq!(unsafe { libc::dup2(deaf.as_raw_fd(), wake) }, wake, "nothing can be written to it");
        let mut drops = DropCounters::default();
        shards[0].hand_over([(1, misdirected())], &mut drops);
        assert_eq!(drops.nonzero().count(), 0);
        assert_eq!(shards[0].events.take().len(), 1, "it is told");
    }

    #[test]
    fn a_superpacket_that_the_queue_has_no_room_for_is_counted_as_its_segments() {
        let shards = three_shards();
        while shards[0].shards[1].queue.try_send(misdirected()).is_ok() {}
        let gso = Some(Gso { kind: GsoKind::Tcp4, segment_size: 1_000 });
        let superpacket = Handoff::ToPeer {
            packet: Template::default().tcp(&payload(3_000)),
            offload: Offload { gso, ..Offload::NONE },
            client: ALICE,
        };
        let mut drops = DropCounters::default();
        shards[0].hand_over([(1, superpacket), (1, misdirected())], &mut drops);
        assert_eq!(drops.get(DropReason::QueueFull), 3 + 1);
    }
}
