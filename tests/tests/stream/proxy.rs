//! A network that does what networks do at their worst.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Result;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::sleep,
};

/// Stands between a feeder and a generator, whose address may change.
#[derive(Clone)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    /// Grows when all connections are to be cut.
    cuts: watch::Sender<u64>,
}

struct Shared {
    target: SocketAddr,
    faults: bool,
    random: StdRng,
}

/// What becomes of one connection.
#[derive(Clone, Copy, Debug)]
struct Fate {
    /// It waits for so long before anything goes through: a newer one may overtake it.
    held: Duration,
    /// Before each piece.
    delay: Duration,
    /// After so many bytes towards the generator it ends.
    cut_after: usize,
    /// After so many bytes from the generator nothing more comes from there: acknowledgements are lost.
    deaf_after: usize,
    /// The byte towards the generator of which a bit is turned.
    corrupted: usize,
}

const NEVER: usize = usize::MAX;

impl Proxy {
    pub(crate) async fn start(target: SocketAddr, seed: u64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (cuts, _) = watch::channel(0);
        let proxy = Self {
            address: listener.local_addr()?,
            shared: Arc::new(Mutex::new(Shared {
                target,
                faults: true,
                random: StdRng::seed_from_u64(seed),
            })),
            cuts,
        };
        let accepting = proxy.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (target, fate) = accepting.fate();
                let cuts = accepting.cuts.subscribe();
                tokio::spawn(carry(stream, target, fate, cuts));
            }
        });
        Ok(proxy)
    }

    pub(crate) fn redirect(&self, target: SocketAddr) {
        self.lock().target = target;
    }

    pub(crate) fn behave(&self) {
        self.lock().faults = false;
        self.cut();
    }

    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fate(&self) -> (SocketAddr, Fate) {
        let mut shared = self.lock();
        let mut fate = Fate {
            held: Duration::ZERO,
            delay: Duration::ZERO,
            cut_after: NEVER,
            deaf_after: NEVER,
            corrupted: NEVER,
        };
        if shared.faults {
            let random = &mut shared.random;
            // Greeting and TLS take some three KiB in each direction: most faults are to happen after them.
            match random.random_range(0..6) {
                0 => fate.cut_after = random.random_range(0..20_000),
                1 => fate.deaf_after = random.random_range(1_500..6_000),
                2 => fate.corrupted = random.random_range(0..12_000),
                3 => fate.delay = Duration::from_millis(random.random_range(1..15)),
                4 => fate.held = Duration::from_millis(random.random_range(1..400)),
                _ => {}
            }
        }
        (shared.target, fate)
    }
}

async fn carry(stream: TcpStream, target: SocketAddr, fate: Fate, mut cuts: watch::Receiver<u64>) {
    let carried = async {
        sleep(fate.held).await;
        let Ok(generator) = TcpStream::connect(target).await else {
            return;
        };
        let (from_agent, to_agent) = stream.into_split();
        let (from_generator, to_generator) = generator.into_split();
        let there = pump(
            from_agent,
            to_generator,
            fate.delay,
            fate.cut_after,
            NEVER,
            fate.corrupted,
        );
        let back = pump(
            from_generator,
            to_agent,
            fate.delay,
            NEVER,
            fate.deaf_after,
            NEVER,
        );
        // Either end takes the other with it.
        tokio::select! {
            () = there => {}
            () = back => {}
        }
    };
    tokio::select! {
        () = carried => {}
        _ = cuts.changed() => {}
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    delay: Duration,
    cut_after: usize,
    deaf_after: usize,
    corrupted: usize,
) {
    let mut piece = [0; 2_048];
    let mut passed = 0;
    while let Ok(read @ 1..) = from.read(&mut piece).await {
        sleep(delay).await;
        if (passed..passed + read).contains(&corrupted) {
            piece[corrupted - passed] ^= 0x10;
        }
        passed += read;
        if passed >= cut_after {
            return;
        }
        if passed < deaf_after && to.write_all(&piece[..read]).await.is_err() {
            return;
        }
    }
}
