//! A small assembler for classic BPF, the language of the kernel's socket filters (Linux,
//! Documentation/networking/filter.rst).
//!
//! A program reads the packet (loads beyond its end return 0), keeps an accumulator `A` and an index register `X`, and
//! returns a number: for a filter the bytes to keep (0: drop), for a steering program the socket's index. Jumps only go
//! forward, to [`Label`]s that are placed later, so that every program ends.

use std::fmt;

use crate::sys::EbpfInstruction;

/// One instruction as the kernel wants it (`struct sock_filter`).
pub type Instruction = libc::sock_filter;

/// What a filter returns to keep the whole packet.
pub const KEEP: u32 = u32::MAX;
/// What a filter returns to drop it.
pub const DROP: u32 = 0;

/// Drops everything.
pub const DROP_ALL: [Instruction; 1] = [instruction(op::RET, DROP)];

/// The same in eBPF, for many sockets to share: `r0 = 0; exit` (`BPF_ALU64 | BPF_MOV | BPF_K`; `BPF_JMP | BPF_EXIT`).
pub(crate) const SILENCE: [EbpfInstruction; 2] = [ebpf(0xb7), ebpf(0x95)];

const fn ebpf(code: u8) -> EbpfInstruction {
    EbpfInstruction { code, registers: 0, offset: 0, immediate: 0 }
}

/// Operation codes (linux/bpf_common.h): class, size or operation, mode or source.
mod op {
    pub(super) const LD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    pub(super) const LD_HALF: u16 = 0x28; // BPF_LD | BPF_H | BPF_ABS
    pub(super) const LD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
    pub(super) const LD_LEN: u16 = 0x80; // BPF_LD | BPF_W | BPF_LEN
    pub(super) const LD_HALF_X: u16 = 0x48; // BPF_LD | BPF_H | BPF_IND
    pub(super) const LD_BYTE_X: u16 = 0x50; // BPF_LD | BPF_B | BPF_IND
    pub(super) const LDX_NIBBLE: u16 = 0xb1; // BPF_LDX | BPF_B | BPF_MSH
    pub(super) const MOD: u16 = 0x94; // BPF_ALU | BPF_MOD | BPF_K
    pub(super) const JA: u16 = 0x05; // BPF_JMP | BPF_JA
    pub(super) const JEQ: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    pub(super) const JEQ_X: u16 = 0x1d; // BPF_JMP | BPF_JEQ | BPF_X
    pub(super) const TAX: u16 = 0x07; // BPF_MISC | BPF_TAX
    pub(super) const JGE: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
    pub(super) const JSET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
    pub(super) const RET: u16 = 0x06; // BPF_RET | BPF_K
    pub(super) const RET_A: u16 = 0x16; // BPF_RET | BPF_A
}

/// Offsets from here on are not of the packet, but of the kernel's notes about it (`SKF_AD_OFF`).
const ANCILLARY: u32 = -0x1000_i32 as u32;
/// The packet's type, of `PACKET_HOST` and others (`SKF_AD_PKTTYPE`).
const PACKET_TYPE: u32 = ANCILLARY + 4;

/// A place to jump to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label(usize);

/// Why a program could not be assembled. None of Tidegate's programs runs into these (their tests say so).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AssemblyError {
    /// A label to which something jumps was never placed, or was placed before the jump.
    UnplacedLabel,
    /// A conditional jump over more than 255 instructions.
    JumpTooFar,
    /// More than 4,096 instructions (`BPF_MAXINSNS`).
    TooLong,
}

impl fmt::Display for AssemblyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnplacedLabel => "a filter program jumps to a label that does not follow",
            Self::JumpTooFar => "a filter program jumps further than 255 instructions",
            Self::TooLong => "a filter program has more than 4,096 instructions",
        })
    }
}

impl std::error::Error for AssemblyError {}

impl From<AssemblyError> for std::io::Error {
    fn from(error: AssemblyError) -> Self {
        Self::new(std::io::ErrorKind::InvalidInput, error)
    }
}

/// A condition on the accumulator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Test {
    /// `A == k`
    Equal(u32),
    /// `A` is `X`.
    EqualX,
    /// `A >= k`, unsigned
    AtLeast(u32),
    /// `A & k != 0`
    AnyBit(u32),
}

/// A program under construction.
#[derive(Default, Debug)]
pub struct Assembler {
    instructions: Vec<Instruction>,
    jumps: Vec<Jump>,
    labels: Vec<Option<usize>>,
}

#[derive(Debug)]
struct Jump {
    at: usize,
    to: Label,
    slot: Slot,
}

/// Which field of an instruction holds the distance.
#[derive(Clone, Copy, Debug)]
enum Slot {
    True,
    False,
    Always,
}

impl Assembler {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// A label, to be placed later.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places `label` before the next instruction.
    pub fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.instructions.len());
    }

    /// `A` = the packet's length.
    pub fn load_length(&mut self) {
        self.push(op::LD_LEN, 0);
    }

    /// `A` = the byte at `offset`.
    pub fn load_byte(&mut self, offset: u32) {
        self.push(op::LD_BYTE, offset);
    }

    /// `A` = the 16-bit word at `offset`, in network byte order.
    pub fn load_half(&mut self, offset: u32) {
        self.push(op::LD_HALF, offset);
    }

    /// `A` = the 32-bit word at `offset`, in network byte order.
    pub fn load_word(&mut self, offset: u32) {
        self.push(op::LD_WORD, offset);
    }

    /// `A` = the packet's type, as `PACKET_HOST`.
    pub fn load_packet_type(&mut self) {
        self.push(op::LD_HALF, PACKET_TYPE);
    }

    /// `X` = four times the low nibble of the byte at `offset`: the length of the IPv4 header that begins there.
    pub fn load_header_length_into_x(&mut self, offset: u32) {
        self.push(op::LDX_NIBBLE, offset);
    }

    /// `X` = `A`.
    pub fn copy_into_x(&mut self) {
        self.push(op::TAX, 0);
    }

    /// `A` = the byte at `X + offset`.
    pub fn load_byte_beyond_x(&mut self, offset: u32) {
        self.push(op::LD_BYTE_X, offset);
    }

    /// `A` = the 16-bit word at `X + offset`, in network byte order.
    pub fn load_half_beyond_x(&mut self, offset: u32) {
        self.push(op::LD_HALF_X, offset);
    }

    /// `A` = `A` modulo `divisor`, which must not be 0 (the kernel refuses such a program).
    pub fn modulo(&mut self, divisor: u32) {
        self.push(op::MOD, divisor);
    }

    /// Goes to `label` if `test` holds.
    pub fn jump_if(&mut self, test: Test, label: Label) {
        self.branch(test, label, Slot::True);
    }

    /// Goes to `label` unless `test` holds.
    pub fn jump_unless(&mut self, test: Test, label: Label) {
        self.branch(test, label, Slot::False);
    }

    /// Goes to `label`.
    pub fn jump(&mut self, label: Label) {
        self.jumps.push(Jump { at: self.instructions.len(), to: label, slot: Slot::Always });
        self.push(op::JA, 0);
    }

    /// Ends with `value`.
    pub fn give(&mut self, value: u32) {
        self.push(op::RET, value);
    }

    /// Ends with `A`.
    pub fn give_a(&mut self) {
        self.push(op::RET_A, 0);
    }

    /// The finished program.
    ///
    /// # Errors
    /// See [`AssemblyError`].
    pub fn assemble(mut self) -> Result<Vec<Instruction>, AssemblyError> {
        if self.instructions.len() > 4096 {
            return Err(AssemblyError::TooLong);
        }
        for jump in &self.jumps {
            let target = self.labels[jump.to.0].ok_or(AssemblyError::UnplacedLabel)?;
            let distance = target.checked_sub(jump.at + 1).ok_or(AssemblyError::UnplacedLabel)?;
            let near = || u8::try_from(distance).map_err(|_| AssemblyError::JumpTooFar);
            let instruction = &mut self.instructions[jump.at];
            match jump.slot {
                Slot::True => instruction.jt = near()?,
                Slot::False => instruction.jf = near()?,
                Slot::Always => instruction.k = distance as u32,
            }
        }
        Ok(self.instructions)
    }

    fn branch(&mut self, test: Test, label: Label, slot: Slot) {
        self.jumps.push(Jump { at: self.instructions.len(), to: label, slot });
        match test {
            Test::Equal(k) => self.push(op::JEQ, k),
            Test::EqualX => self.push(op::JEQ_X, 0),
            Test::AtLeast(k) => self.push(op::JGE, k),
            Test::AnyBit(k) => self.push(op::JSET, k),
        }
    }

    fn push(&mut self, code: u16, k: u32) {
        self.instructions.push(instruction(code, k));
    }
}

const fn instruction(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

#[cfg(test)]
pub(crate) mod interpreter {
    //! Runs programs as the kernel does, so that they can be tested without a socket.
    use super::*;

    /// What `program` returns for `packet`, whose type (`PACKET_HOST`, ...) is `packet_type`.
    pub(crate) fn run(program: &[Instruction], packet: &[u8], packet_type: u32) -> u32 {
        let (mut a, mut x, mut at) = (0u32, 0u32, 0usize);
        let load = |offset: u32, size: usize| -> Option<u32> {
            let bytes = packet.get(offset as usize..offset as usize + size)?;
            Some(bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
        };
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            at += 1;
            let loaded = match code {
                op::LD_HALF if k == PACKET_TYPE => Some(packet_type),
                op::LD_WORD => load(k, 4),
                op::LD_HALF => load(k, 2),
                op::LD_BYTE => load(k, 1),
                op::LD_LEN => Some(packet.len() as u32),
                op::LD_HALF_X => load(x + k, 2),
                op::LD_BYTE_X => load(x + k, 1),
                _ => Some(a),
            };
            let Some(loaded) = loaded else { return 0 };
            a = loaded;
            let test = match code {
                op::JEQ => Some(a == k),
                op::JEQ_X => Some(a == x),
                op::JGE => Some(a >= k),
                op::JSET => Some(a & k != 0),
                _ => None,
            };
            if let Some(holds) = test {
                at += usize::from(if holds { jt } else { jf });
            }
            match code {
                op::LDX_NIBBLE => match load(k, 1) {
                    Some(byte) => x = (byte & 0xf) * 4,
                    None => return 0,
                },
                op::TAX => x = a,
                op::MOD => a %= k,
                op::JA => at += k as usize,
                op::RET => return k,
                op::RET_A => return a,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::interpreter::run;
    use super::*;

    #[test]
    fn a_label_is_reached_by_every_kind_of_jump() {
        let mut program = Assembler::new();
        let (seven, other) = (program.label(), program.label());
        program.load_byte(0);
        program.jump_if(Test::Equal(7), seven);
        program.jump_unless(Test::AtLeast(100), other);
        program.give(100);
        program.place(seven);
        program.give(7);
        program.place(other);
        program.give(1);
        let program = program.assemble().unwrap();
        assert_eq!([7, 100, 200, 3].map(|byte| run(&program, &[byte], 0)), [7, 100, 100, 1]);
    }

    #[test]
    fn a_load_beyond_the_end_gives_zero() {
        let mut program = Assembler::new();
        program.load_word(1);
        program.give(9);
        let program = program.assemble().unwrap();
        assert_eq!([run(&program, &[0; 4], 0), run(&program, &[0; 5], 0)], [0, 9]);
    }

    #[test]
    fn a_program_that_cannot_be_encoded_is_refused() {
        let mut program = Assembler::new();
        let end = program.label();
        program.jump_if(Test::Equal(0), end);
        assert_eq!(program.assemble().unwrap_err(), AssemblyError::UnplacedLabel);

        let mut program = Assembler::new();
        let end = program.label();
        program.jump_if(Test::Equal(0), end);
        (0..256).for_each(|_| program.load_length());
        program.place(end);
        program.give(0);
        assert_eq!(program.assemble().unwrap_err(), AssemblyError::JumpTooFar);
    }
}
