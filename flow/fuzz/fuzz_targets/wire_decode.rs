//! Whatever an agent sends, in either encoding: it is refused, or a message that means the same when it is said again,
//! and that the two ways to decode it agree on.
#![no_main]

use flow::wire::{AgentMessage, Encoding, RawMessage, decode, encode, with_sequence};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for encoding in [Encoding::MessagePack, Encoding::Json] {
        let whole = decode::<AgentMessage>(bytes, encoding);
        let raw = decode::<RawMessage<'_>>(bytes, encoding);
        match (&whole, raw) {
            (Ok(AgentMessage::Hello(hello)), Ok(RawMessage::Hello(raw))) => assert_eq!(*hello, raw),
            (Ok(AgentMessage::Batch(batch)), Ok(RawMessage::Batch(raw))) => {
                raw.check().unwrap();
                assert_eq!(batch.flows.len(), raw.flows.len());
                for (record, flow) in batch.flows.iter().zip(&raw.flows) {
                    let src = raw.ends[flow.src as usize].decode(encoding).unwrap();
                    assert_eq!(record.src, src.endpoint);
                    assert_eq!(record.tuple.src_addr, src.address);
                }
            }
            // Ends that are none, or not there, are found out later.
            (Err(_), _) => {}
            (Ok(_), raw) => panic!("{raw:?}"),
        }
        if let Ok(message) = &whole
            && let Ok(again) = encode(message, encoding)
        {
            // Times beyond the year 2255 have no microseconds in a float, so equal they need not be.
            let again = decode::<AgentMessage>(&again, encoding).unwrap();
            match (&again, message) {
                (AgentMessage::Hello(again), AgentMessage::Hello(hello)) => {
                    assert_eq!(again.instance, hello.instance);
                }
                (AgentMessage::Batch(again), AgentMessage::Batch(batch)) => {
                    assert_eq!(again.flows.len(), batch.flows.len());
                    for (again, flow) in again.flows.iter().zip(&batch.flows) {
                        assert_eq!((&again.src, &again.dst), (&flow.src, &flow.dst));
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }
    if let Ok(numbered) = with_sequence(bytes, 7)
        && let Ok(AgentMessage::Batch(batch)) = decode(&numbered, Encoding::MessagePack)
    {
        assert_eq!(batch.sequence, 7);
    }
});
